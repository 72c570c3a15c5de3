"""What changed layers are made of: against arithmetic by hand, whatever part of a tensor is asked for."""

import contextlib

import pytest
import torch

from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.layer_source import MappedSource, made_chunks, making, noise_rows
from solar_mega.artifact.safetensors_reader import CHUNK_BYTES, as_bytes
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.artifact.verify import verify
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from tests.artifact.conftest import make_llama

SPELLING = "0,1,1~2,2~4,3,5,5+scale:0.5@3+o_proj:0@4+down_proj:-2@5+noise:0.05:7@4-6+scale:0@6"
"""mean; mean scaled; o_proj 0 and noise; down_proj -2 and noise; an identity block."""


def by_hand(read, layer_map, target, suffix):
    """The tensor in one go, written out."""
    parts = [read(f"model.layers.{layer}.{suffix}") for layer in layer_map.sources_of(target)]
    value = sum(part.float() for part in parts) / len(parts)
    modifier = layer_map.modifiers[target]
    for name in ("o_proj", "down_proj"):
        if name in suffix:
            value = value * getattr(modifier, name)
    if modifier.noise and parts[0].dim() == 2:
        recipe = making(layer_map, target, suffix, 2)
        value = value + noise_rows(recipe, parts[0].shape, 0, parts[0].shape[0])
    return value.to(parts[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grown_directory_equals_arithmetic_by_hand(tmp_path, dtype):
    source = HFDirectory(make_llama(tmp_path / "source", dtype=dtype))
    layer_map = LayerMap.parse(SPELLING, 6)
    grow(source, tmp_path / "grown", layer_map)
    grown = HFDirectory(tmp_path / "grown")
    for target in range(len(layer_map)):
        for name in source.tensors.infos:
            if name.startswith("model.layers.0."):
                suffix = name.removeprefix("model.layers.0.")
                expected = by_hand(source.tensors.read, layer_map, target, suffix)
                assert torch.equal(grown.tensors.read(f"model.layers.{target}.{suffix}"), expected), suffix
    report = verify(source, grown, layer_map)
    assert report.ok, report.describe()
    for other in (SPELLING.replace(":7@", ":8@"), SPELLING.replace("0.5@3", "0.25@3"), "0,1,2,2,3,5,5"):
        assert not verify(source, grown, LayerMap.parse(other, 6)).ok


def test_a_change_of_dtype_comes_after_the_map(llama, tmp_path):
    source, layer_map = HFDirectory(llama), LayerMap.parse(SPELLING, 6)
    grow(source, tmp_path / "fp32", layer_map)
    grow(source, tmp_path / "bf16", layer_map, dtype="BF16")
    wide, narrow = HFDirectory(tmp_path / "fp32").tensors, HFDirectory(tmp_path / "bf16").tensors
    for name in wide.infos:
        assert torch.equal(wide.read(name).bfloat16(), narrow.read(name))
    assert verify(source, HFDirectory(tmp_path / "bf16"), layer_map, "BF16").ok


def test_parts_agree_with_the_whole(llama):
    reader, layer_map = HFDirectory(llama).tensors, LayerMap.parse(SPELLING, 6)
    mapped = MappedSource(reader, layer_map)
    for target in range(len(layer_map)):
        for suffix, columns in (("mlp.down_proj.weight", 48), ("self_attn.o_proj.weight", 32)):
            name = f"model.layers.{target}.{suffix}"
            whole = mapped.read_rows(name, 0, 32)
            assert torch.equal(whole, by_hand(reader.read, layer_map, target, suffix))
            assert torch.equal(mapped.read_rows(name, 5, 17), whole[5:17])
            assert torch.equal(mapped.read_rows(name, 8, columns - 3, dim=1), whole[:, 8 : columns - 3])
    assert torch.equal(mapped.read_rows("model.norm.weight", 0, 32), reader.read("model.norm.weight"))


def test_what_is_scaled_by_nothing_is_not_read(llama):
    reader = HFDirectory(llama).tensors
    mapped = MappedSource(reader, LayerMap.parse("append:1", 6))
    zeros = mapped.read_rows("model.layers.6.mlp.down_proj.weight", 0, 32)
    assert zeros.shape == (32, 48) and not zeros.any() and reader.bytes_read == 0


def test_large_tensors_are_made_in_chunks_of_the_readers_size(tmp_path):
    """Three chunks and a bit, with rows that do not divide a chunk."""
    rows, columns = 1030, 3 * CHUNK_BYTES // 1024 // 4 + 11
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.randn(rows, columns) for i in range(2)}
    with ShardedWriter(tmp_path) as writer:
        writer.plan([(name, "F32", tensor.shape) for name, tensor in tensors.items()])
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    layer_map = LayerMap.parse("0~1+scale:0.3+noise:0.1", 2)
    reader = _Plain(tmp_path)
    chunks = list(made_chunks(reader, making(layer_map, 0, "mlp.down_proj.weight", 2), "F32"))
    expected = by_hand(reader.read, layer_map, 0, "mlp.down_proj.weight")
    assert b"".join(chunks) == bytes(as_bytes(expected))
    assert [len(chunk) for chunk in chunks[:-1]] == [CHUNK_BYTES] * 3


def _Plain(directory):
    from solar_mega.artifact.safetensors_reader import SafetensorsReader

    return SafetensorsReader(directory)


class TestNoise:
    SHAPE = (300, 400)

    def draw(self, spelling="identity+noise:0.02:3", target=1, suffix="mlp.up_proj.weight", rows=(0, 300)):
        recipe = making(LayerMap.parse(spelling, 4), target, suffix, 2)
        return noise_rows(recipe, self.SHAPE, *rows)

    def test_it_is_normal_with_the_deviation_asked_for(self):
        """120000 draws: the mean's standard error is 0.02 / 346, the deviation's 0.02 / 490."""
        drawn = self.draw().double()
        assert abs(drawn.mean()) < 5 * 0.02 / 346
        assert abs(drawn.std() - 0.02) < 5 * 0.02 / 490
        assert abs((drawn.abs() < 0.02).double().mean() - 0.6827) < 0.01

    def test_it_depends_on_seed_layer_and_name_alone(self):
        drawn = self.draw()
        assert torch.equal(drawn, self.draw())
        assert torch.equal(drawn, self.draw("stack:2+noise:0.02:3"))
        for other in (
            self.draw("identity+noise:0.02:4"),
            self.draw(target=2),
            self.draw(suffix="mlp.gate_proj.weight"),
        ):
            correlation = torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]
            assert abs(correlation) < 5 / 346
        assert torch.equal(self.draw("identity+noise:0.04:3"), drawn * 2)

    def test_rows_are_independent_of_each_other(self):
        drawn = self.draw()
        assert torch.equal(self.draw(rows=(100, 120)), drawn[100:120])
        neighbours = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
        assert abs(neighbours) < 5 / 346

    def test_the_first_values_stay_what_they_are(self):
        """A change of the stream would silently change what a recipe means."""
        recipe = making(LayerMap.parse("identity+noise:1:7", 4), 1, "mlp.up_proj.weight", 2)
        first = noise_rows(recipe, (2, 3), 0, 2)
        torch.testing.assert_close(first, torch.tensor(FIRST), rtol=0, atol=1e-6)


FIRST = [[0.4288858, -0.7807762, -0.343888], [-1.661461, -0.692269, 0.4349339]]


@pytest.mark.parametrize("spelling", ["llama-pro:3", "append:2", "repeat:2-4+scale:0@4-6", "identity+freeze"])
def test_maps_that_preserve_the_function_do(llama, tmp_path, spelling):
    """Bit for bit: adding an exact zero changes nothing."""
    from transformers import AutoModelForCausalLM

    layer_map = LayerMap.parse(spelling, 6)
    assert layer_map.preserves_function
    grow(HFDirectory(llama), tmp_path / "grown", layer_map)
    tokens = torch.arange(40)[None] % 96
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(p)(tokens).logits for p in (llama, tmp_path / "grown")]
    assert torch.equal(*logits)


class TestRefusals:
    def test_a_mean_of_integers(self, tmp_path):
        directory = make_llama(tmp_path / "source")
        source = HFDirectory(directory)
        grown = tmp_path / "grown"
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(ShardedWriter(_empty(tmp_path / "quantised")))
            infos = source.tensors.infos
            writer.plan([(n, "I8" if i.shape == (32, 48) else i.dtype, i.shape) for n, i in infos.items()])
            for name, info in infos.items():
                tensor = source.tensors.read(name)
                writer.write(name, tensor.to(torch.int8) if info.shape == (32, 48) else tensor)
        (tmp_path / "quantised" / "config.json").write_text((directory / "config.json").read_text())
        with pytest.raises(UserError, match="down_proj.weight is I8"):
            grow(HFDirectory(tmp_path / "quantised"), grown, LayerMap.parse("mean", 6))
        assert not grown.exists()

    def test_a_scale_without_its_matrix(self, llama, tmp_path):
        source = HFDirectory(llama)
        infos = source.tensors.infos
        for name in [name for name in infos if "o_proj" in name]:
            infos[name.replace("o_proj", "out")] = infos.pop(name)
        with pytest.raises(UserError, match="target layer 6 scales o_proj, which layer 5 does not have"):
            grow(source, tmp_path / "grown", LayerMap.parse("append:1", 6))

    def test_fresh_layers(self, llama, tmp_path):
        with pytest.raises(UserError, match=r"\[1\] are fresh"):
            grow(HFDirectory(llama), tmp_path / "grown", LayerMap(6, (0, None)))


def _empty(path):
    path.mkdir()
    return path
