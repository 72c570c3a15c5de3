"""Conversions on disk: what stock Megatron reads and writes, links, optimizer states, bad input."""

import errno
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.depth.layer_map import LayerMap
from tests.checkpoint import training
from tests.checkpoint.training import save_homogeneous
from tests.distributed import run_ranks
from tests.families import make_family
from tests.ranks import layout

MAP = "dus:0"  # 12 layers of 6: with one stage, both copies of every layer lie on the same rank
TARGETS = [(2, 3, 1), (1, 4, 1), (1, 1, 1), (1, 2, 3)]
ROUTES = ("zero_copy", "copy")
SOURCES = ("tp1pp1", "tp2pp2", "tp1pp3")
KIND = "bf16-dist"


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """6 layers, so that 1, 2 and 3 stages divide them."""
    return make_family("mistral_head_dim", tmp_path_factory.mktemp("source"), layers=6)


def _save_sources(directory, root):
    """Two steps of training, saved, on each layout of this world; stacked as stock Megatron saves, too."""
    from solar_mega.checkpoint.megatron import save_checkpoint
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture

    source = HFDirectory(directory)
    arch = Architecture.from_hf(source.config)
    identity = LayerMap.parse("identity", arch.num_layers)
    for tp, pp in ((1, 1), (2, 2)):
        with layout(tp, pp, distributed_optimizer=True) as parallel:
            run = training.start(arch, parallel, KIND, source.tensors, arch, identity)
            run.steps(0, 2)
            save_checkpoint(CheckpointStore(root / f"tp{tp}pp{pp}"), run.chunks, run.optimizer, run.state(2))
            if (tp, pp) == (2, 2):
                save_homogeneous(run, root / "stock")


@pytest.fixture(scope="module")
def root(source, tmp_path_factory) -> Path:
    """Checkpoints of several layouts, and what each Megatron-to-Megatron route makes of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    run_ranks(_save_sources, 4, source, root)
    pp3 = ("--to", "megatron", "--pp", 3, "--dtype", "bf16")  # weights alone
    assert run("convert", source, root / "tp1pp3", *pp3) == 0
    for name in (*SOURCES, "stock"):
        for route in ROUTES:
            flags = ["--zero-copy"] if route == "zero_copy" else ["--shard-size", "300KB"]
            made = root / f"{name}-{route}"
            assert run("convert", root / name, made, "--to", "megatron", "--layer-map", MAP, *flags) == 0
            assert run("verify", root / name, made, "--layer-map", MAP) == 0
    assert (
        run(
            "convert", source, root / "imported", "--to", "megatron", "--layer-map", MAP, "--tp", 2, "--pp", 3
        )
        == 0
    )
    return root


def _load_targets(root, targets):
    """(made, layout) -> differing tensors against the source's full ones, cut by hand; first steps of the
    loaded run and of one whose every tensor was put in by hand."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    from solar_mega.checkpoint.megatron import load_checkpoint, load_tensors
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture

    layer_map = LayerMap.parse(MAP, 6)
    imported = CheckpointStore(root / "imported").latest()
    arch = Architecture.from_hf(json.loads((imported / "run_state.json").read_text())["state"]["hf_config"])
    results = {}
    for tp, pp, vpp in targets:
        with layout(tp, pp, vpp, distributed_optimizer=True) as parallel:
            loaded = training.start(arch, parallel, KIND)
            apart = ensure_metadata_has_dp_cp_group({"non_homogeneous_layers": True})
            contents = {
                f"model{i}": chunk.sharded_state_dict(metadata=apart) for i, chunk in enumerate(loaded.chunks)
            }
            read = dist_checkpointing.load(contents, str(imported), strict="raise_all")
            count = sum(len(read[key]) for key in contents)
            results["imported", (tp, pp, vpp)] = (count, [], None)
            for name in (*SOURCES, "stock"):
                for route in ROUTES:
                    made = root / f"{name}-{route}"
                    if name == "stock":
                        load_tensors(made, loaded.chunks, loaded.optimizer)
                        origin = root / name
                    else:
                        states = None if name == "tp1pp3" else loaded.optimizer
                        load_checkpoint(CheckpointStore(made).latest(), loaded.chunks, states)
                        origin = CheckpointStore(root / name).latest()
                    compared, wrong = training.differences(origin, loaded, layer_map, name != "tp1pp3")
                    steps = None
                    if (name, route, vpp) == ("tp2pp2", "zero_copy", 1):
                        oracle = training.start(arch, parallel, KIND)
                        training.put_by_hand(origin, oracle, layer_map, step=2)
                        steps = (loaded.steps(2, 2), oracle.steps(2, 2))
                    results[made.name, (tp, pp, vpp)] = (compared, wrong, steps)
    return results


@pytest.fixture(scope="module")
def loaded(root):
    results = []
    for world in (6, 4):
        targets = [t for t in TARGETS if (t == (2, 3, 1)) == (world == 6)]
        results += run_ranks(_load_targets, world, root, targets)
    return results


def test_every_route_from_every_layout_to_every_layout_is_bit_exact(loaded):
    seen = set()
    for result in loaded:
        for key, (compared, wrong, _) in result.items():
            seen.add(key)
            assert compared > 0 and not wrong, (key, wrong)
    made = ["imported", *(f"{name}-{route}" for name in (*SOURCES, "stock") for route in ROUTES)]
    assert seen == {(name, target) for name in made for target in TARGETS}


def test_training_goes_on_as_from_tensors_put_in_by_hand(loaded):
    """Weights, master weights and moments of a grown checkpoint: the same losses and gradient norms,
    exactly."""
    compared = 0
    for result in loaded:
        for _, _, steps in result.values():
            if steps is not None:
                assert steps[0] == steps[1]
                compared += 1
    assert compared >= 6 + 4 + 4


def test_the_stock_reader_gets_the_tensors_packed_by_hand(source, root):
    """What the import wrote, read by torch's own loader without a layout, against numpy slices of the
    source."""
    import torch.distributed.checkpoint as stock
    from torch.distributed.checkpoint import FileSystemReader

    place = root / "imported" / "step-00000000"
    metadata = FileSystemReader(place).read_metadata().state_dict_metadata
    full = {
        k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in metadata.items() if hasattr(v, "size")
    }
    stock.load(full, storage_reader=FileSystemReader(place), no_dist=True)
    hf, config = HFDirectory(source).tensors, HFDirectory(source).config
    heads, groups, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    for g, s in enumerate([*range(6), *range(6)]):
        own, theirs = f"decoder.layers.{g}.", f"model.layers.{s}."
        q, k, v = (hf.read(f"{theirs}self_attn.{part}_proj.weight") for part in "qkv")
        rows = []
        for group in range(groups):
            per = heads // groups
            rows += [q[(group * per + i) * d : (group * per + i + 1) * d] for i in range(per)]
            rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
        gate, up = (hf.read(f"{theirs}mlp.{part}_proj.weight") for part in ("gate", "up"))
        expected = {
            "self_attention.linear_qkv.weight": torch.cat(rows),
            "self_attention.linear_proj.weight": hf.read(f"{theirs}self_attn.o_proj.weight"),
            "self_attention.linear_qkv.layer_norm_weight": hf.read(f"{theirs}input_layernorm.weight"),
            "mlp.linear_fc1.weight": torch.cat([gate, up]),
            "mlp.linear_fc2.weight": hf.read(f"{theirs}mlp.down_proj.weight"),
            "mlp.linear_fc1.layer_norm_weight": hf.read(f"{theirs}post_attention_layernorm.weight"),
        }
        for name, tensor in expected.items():
            assert torch.equal(full.pop(own + name), tensor), own + name
    assert torch.equal(full.pop("embedding.word_embeddings.weight"), hf.read("model.embed_tokens.weight"))
    assert torch.equal(full.pop("output_layer.weight"), hf.read("lm_head.weight"))
    assert torch.equal(full.pop("decoder.final_layernorm.weight"), hf.read("model.norm.weight"))
    assert not full


def test_links_take_no_room_and_leave_the_source_alone(root):
    source, made = (root / name / "step-00000002" for name in ("tp2pp2", "tp2pp2-zero_copy"))
    for file in source.glob("*.distcp"):
        assert (made / file.name).stat().st_ino == file.stat().st_ino
    assert (made / ".metadata").stat().st_ino != (source / ".metadata").stat().st_ino
    state = json.loads((made / "run_state.json").read_text())["state"]
    assert state["step"] == 2 and state["hf_config"]["num_hidden_layers"] == 12
    assert state["lineage"]["layer_map"]["spelling"] == MAP


def test_another_programs_checkpoint_becomes_a_hugging_face_directory(source, root, tmp_path, capsys):
    assert run("convert", root / "stock", tmp_path / "no") == 2
    assert "--hf-config" in capsys.readouterr().err
    words = ("--hf-config", source)
    assert (
        run("convert", root / "stock", tmp_path / "hf", "--layer-map", "dus:2", *words, "--dtype", "bf16")
        == 0
    )
    assert run("verify", root / "stock", tmp_path / "hf", "--layer-map", "dus:2", *words) == 0
    with CheckpointTensors(root / "stock") as stored:
        expected = stored.read("decoder.layers.5.mlp.linear_fc2.weight")
    assert torch.equal(
        HFDirectory(tmp_path / "hf").tensors.read("model.layers.7.mlp.down_proj.weight"), expected
    )


def test_optimizer_states_can_be_left_out(root, tmp_path):
    words = ("--to", "megatron", "--optimizer", "drop")
    for name, flags in (("links", ["--zero-copy"]), ("wide", ["--dtype", "fp32"])):
        assert run("convert", root / "tp2pp2", tmp_path / name, *words, *flags) == 0
        place = tmp_path / name / "step-00000000"
        with CheckpointTensors(place) as stored:
            assert not stored.states and stored.weights
        assert "optimizer" not in torch.load(place / "common.pt")
    assert run("verify", root / "tp2pp2", tmp_path / "links") == 0
    assert run("verify", root / "tp2pp2", tmp_path / "wide", "--dtype", "fp32") == 0
    assert run("verify", root / "tp2pp2", tmp_path / "wide") == 1


def test_maps_that_change_weights(root, tmp_path, capsys):
    """llama-pro's new layers are stored anew beside the links; states cannot follow them."""
    words = ("--to", "megatron", "--zero-copy", "--layer-map", "llama-pro:2")
    assert run("convert", root / "tp2pp2", tmp_path / "no", *words) == 2
    assert "--optimizer drop" in capsys.readouterr().err
    for name, route in (("links", ["--zero-copy"]), ("copy", [])):
        made = tmp_path / name
        flags = ("--to", "megatron", "--layer-map", "llama-pro:2", "--optimizer", "drop", *route)
        assert run("convert", root / "tp2pp2", made, *flags) == 0
        assert run("verify", root / "tp2pp2", made, "--layer-map", "llama-pro:2") == 0
        with CheckpointTensors(made / "step-00000000") as stored:
            assert not stored.read("decoder.layers.3.mlp.linear_fc2.weight").any()
            assert stored.read("decoder.layers.2.mlp.linear_fc2.weight").any()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_across_file_systems_it_copies_and_says_so(root, tmp_path, capsys, monkeypatch, number):
    def refuse(source, target, **_):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)  # a second file system is not to be had in every test environment
    made = tmp_path / "made"
    assert run("convert", root / "tp2pp2", made, "--to", "megatron", "--zero-copy", "--layer-map", MAP) == 0
    assert "copying instead" in capsys.readouterr().out
    assert run("verify", root / "tp2pp2", made, "--layer-map", MAP) == 0


class TestIndex:
    """`.metadata` of strangers."""

    @pytest.fixture
    def copy(self, root, tmp_path) -> Path:
        return shutil.copytree(root / "tp1pp1" / "step-00000002", tmp_path / "copy")

    def refused(self, path: Path, target: Path, capsys) -> str:
        state = path / "run_state.json"
        content = json.loads(state.read_text())
        content["files"][".metadata"] = (path / ".metadata").stat().st_size
        state.write_text(json.dumps(content))
        for flags in (["--to", "hf"], ["--to", "megatron"], ["--to", "megatron", "--zero-copy"]):
            assert run("convert", path, target / "x", *flags) == 2
            error = capsys.readouterr().err
            assert "Traceback" not in error and not (target / "x").exists()
        return error

    def test_code_in_it_is_not_run(self, copy, tmp_path, capsys):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        (copy / ".metadata").write_bytes(pickle.dumps(Evil()))
        error = self.refused(copy, tmp_path, capsys)
        assert "posix.system" in error and "refused" in error and not (tmp_path / "ran").exists()
        from solar_mega.checkpoint.run_state import describe_megatron
        from solar_mega.errors import UserError

        with pytest.raises(UserError, match="refused"):
            describe_megatron(copy)

    def test_something_else_or_garbage(self, copy, tmp_path, capsys):
        (copy / ".metadata").write_bytes(pickle.dumps({"a": 1}))
        assert "holds a dict, not an index" in self.refused(copy, tmp_path, capsys)
        (copy / ".metadata").write_bytes(b"\x80\x04garbage")
        assert "is damaged" in self.refused(copy, tmp_path, capsys)

    def test_items_outside_the_checkpoint(self, copy, tmp_path, capsys):
        content = pickle.loads((copy / ".metadata").read_bytes())
        index = next(iter(content.storage_data))
        content.storage_data[index].relative_path = "../../secrets"
        (copy / ".metadata").write_bytes(pickle.dumps(content))
        assert "outside the checkpoint" in self.refused(copy, tmp_path, capsys)

    def test_items_that_are_not_what_the_index_says(self, root, copy, tmp_path, capsys):
        content = pickle.loads((copy / ".metadata").read_bytes())
        for index, place in content.storage_data.items():
            if index.fqn == "decoder.layers.1.mlp.linear_fc2.weight":
                place.offset += 64
        (copy / ".metadata").write_bytes(pickle.dumps(content))
        state = json.loads((copy / "run_state.json").read_text())
        state["files"][".metadata"] = (copy / ".metadata").stat().st_size
        (copy / "run_state.json").write_text(json.dumps(state))
        assert run("convert", copy, tmp_path / "x") == 2
        assert "decoder.layers.1.mlp.linear_fc2.weight" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
        assert run("verify", root / "tp1pp1", copy) == 1

    def test_common_part_of_a_stranger(self, copy, tmp_path, capsys):
        torch.save({"args": Path}, copy / "common.pt")  # a class, not a value
        state = json.loads((copy / "run_state.json").read_text())
        state["files"]["common.pt"] = (copy / "common.pt").stat().st_size
        (copy / "run_state.json").write_text(json.dumps(state))
        torch.save({"args": subprocess.Popen}, copy / "common.pt")
        state["files"]["common.pt"] = (copy / "common.pt").stat().st_size
        (copy / "run_state.json").write_text(json.dumps(state))
        assert run("convert", copy, tmp_path / "x", "--to", "megatron", "--zero-copy") == 2
        assert "refused" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_truncated_files(root, tmp_path, capsys):
    copy = shutil.copytree(root / "stock", tmp_path / "copy")
    file = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    for flags in (["--to", "megatron"], ["--to", "hf", "--hf-config", str(root / "tp2pp2")]):
        assert run("convert", copy, tmp_path / "x", *flags) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]
