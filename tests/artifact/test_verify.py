"""verify: equality to the last bit, and the first difference named wherever it is."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.safetensors_format import DTYPES, INDEX
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.artifact.verify import verify
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError

from .conftest import make_llama

DUS = LayerMap.parse("dus:2", 6)


@pytest.fixture
def pair(llama, tmp_path):
    grow(HFDirectory(llama), tmp_path / "grown", DUS, shard_bytes=50_000)
    return llama, tmp_path / "grown"


def check(source, grown, layer_map=DUS):
    return verify(HFDirectory(source), HFDirectory(grown), layer_map)


def overwrite(directory, name, position, data):
    info = SafetensorsReader(directory).infos[name]
    with open(directory / info.file, "r+b") as stream:
        stream.seek(info.offset + position)
        stream.write(data)


def test_equal(pair):
    report = check(*pair)
    grown = SafetensorsReader(pair[1])
    assert report.ok and (report.tensors, report.nbytes) == (len(grown.infos), grown.total_bytes)
    assert (
        report.describe().startswith(f"equal: {report.tensors} tensors")
        and "bit for bit" in report.describe()
    )


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_is_found_named_and_located(pair, data):
    reader = SafetensorsReader(pair[1])
    info = reader.infos[data.draw(st.sampled_from(sorted(reader.infos)))]
    byte = data.draw(st.integers(0, info.nbytes - 1))
    good = b"".join(reader.raw(info.name))[byte]
    overwrite(pair[1], info.name, byte, bytes([good ^ (1 << data.draw(st.integers(0, 7)))]))
    try:
        report = check(*pair)
    finally:
        overwrite(pair[1], info.name, byte, bytes([good]))
    assert not report.ok and report.structure == ()
    element = byte // (DTYPES[info.dtype][0] // 8)
    assert report.difference.name == info.name
    assert report.difference.index == tuple(
        int(i) for i in torch.unravel_index(torch.tensor(element), info.shape)
    )
    assert info.name in report.describe()


def test_the_message_shows_place_and_values(pair):
    name = "model.layers.5.input_layernorm.weight"  # dus:2 of 6: target 5 is source 3
    value = SafetensorsReader(pair[0]).read("model.layers.3.input_layernorm.weight")[7].item()
    overwrite(pair[1], name, 4 * 7, torch.tensor([1.5]).numpy().tobytes())
    text = check(*pair).describe()
    assert (
        f"{name} differs from source model.layers.3.input_layernorm.weight at [7]: 1.5 (0x3fc00000)" in text
    )
    assert f"expected {value:g} (" in text


def test_equal_values_with_other_bits_differ(tmp_path):
    """-0.0 is not 0.0 here, and a NaN equals only itself to the bit."""
    source = make_llama(tmp_path / "source", layers=2, dtype=torch.bfloat16)
    name = "model.norm.weight"
    overwrite(source, name, 0, b"\x00\x00\xc0\x7f")
    layer_map = LayerMap.parse("stack:2", 2)
    grow(HFDirectory(source), tmp_path / "grown", layer_map)
    assert check(source, tmp_path / "grown", layer_map).ok
    overwrite(tmp_path / "grown", name, 0, b"\x00\x80")
    difference = check(source, tmp_path / "grown", layer_map).difference
    assert (difference.index, difference.found, difference.expected) == ((0,), "-0 (0x8000)", "0 (0x0000)")
    overwrite(tmp_path / "grown", name, 0, b"\x00\x00\xc1\x7f")
    assert check(source, tmp_path / "grown", layer_map).difference.found == "nan (0x7fc1)"


def test_two_layers_swapped(pair):
    source, grown = pair
    index = json.loads((grown / INDEX).read_text()) if (grown / INDEX).exists() else None
    assert index, "several shards, or the test proves less"
    assert not check(source, grown, LayerMap.parse("0,1,3,2,2,3,4,5", 6)).ok
    assert not check(source, grown, LayerMap.parse("dus:3", 6)).ok
    assert "num_hidden_layers is 8, expected 6" in check(source, grown, LayerMap.parse("dus:3", 6)).describe()


def rewrite(directory, change):
    """The same directory with its tensors passed through `change(dict)`."""
    with SafetensorsReader(directory) as reader:
        tensors = {name: reader.read(name) for name in reader.infos}
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    from solar_mega.artifact.safetensors_format import dtype_name

    with ShardedWriter(directory) as writer:
        writer.plan([(name, dtype_name(t.dtype), t.shape) for name, t in tensors.items()])
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_missing_extra_and_misshapen_tensors_are_all_named(pair):
    def change(tensors):
        del tensors["model.layers.7.mlp.up_proj.weight"]
        tensors["model.layers.8.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(4, 8)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

    rewrite(pair[1], change)
    report = check(*pair)
    text = report.describe()
    assert "model.layers.7.mlp.up_proj.weight is missing (source model.layers.5.mlp.up_proj.weight)" in text
    assert "model.layers.8.mlp.up_proj.weight is extra" in text
    assert "model.norm.weight is F32 [4, 8], expected F32 [32]" in text
    assert "lm_head.weight is F16" in text
    assert not report.ok and report.difference is None


def test_buffers_that_transformers_recomputes_may_be_gone(pair):
    def change(tensors):
        for layer in range(6):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(pair[0], change)
    assert check(*pair).ok


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_destination_is_different(pair, damage):
    source, grown = pair
    shard = max(grown.glob("*.safetensors"))
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "missing":
        shard.unlink()
    else:
        content = json.loads((grown / INDEX).read_text())
        content["weight_map"]["ghost"] = shard.name
        (grown / INDEX).write_text(json.dumps(content))
    report = check(source, grown)
    assert not report.ok and (shard.name in report.describe()) and "DIFFERENT" in report.describe()


def test_a_damaged_source_is_an_error(pair):
    shard = max(pair[0].glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match="truncated"):
        check(*pair)


@pytest.mark.parametrize(
    "key, value", [("num_hidden_layers", 7), ("rms_norm_eps", 1.0), ("hidden_act", "gelu")]
)
def test_config_is_part_of_the_model(pair, key, value):
    path = pair[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    report = check(*pair)
    assert not report.ok and f"config.json: {key} is {value!r}" in report.describe()


def test_config_keys_that_are_not_the_model(pair):
    path = pair[1] / "config.json"
    changed = json.loads(path.read_text()) | {
        "transformers_version": "0",
        "use_cache": False,
        "new_default": 1,
    }
    path.write_text(json.dumps(changed))
    assert check(*pair).ok


def test_memory_does_not_grow_with_tensors(tmp_path):
    """One 64 MB tensor through grow, cast and verify at a few MB of Python memory."""
    import tracemalloc

    source = make_llama(tmp_path / "source", layers=2, vocab_size=500_000, max_shard_size="1GB")
    layer_map = LayerMap.parse("stack:2", 2)
    for dtype in (None, "BF16"):
        grown = tmp_path / f"grown{dtype}"
        tracemalloc.start()
        grow(HFDirectory(source), grown, layer_map, dtype)
        assert verify(HFDirectory(source), HFDirectory(grown), layer_map, dtype).ok
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20, f"{peak >> 20} MB"
