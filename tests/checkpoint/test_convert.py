"""Hugging Face -> Megatron -> Hugging Face on disk, in one process and in four; verification; bad input."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.verify import verify
from solar_mega.checkpoint.run_state import describe_megatron, read_run_state
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from tests.distributed import ROOT, run_ranks
from tests.families import make_family, transformers_logits
from tests.ranks import layout


def _convert(*calls):
    from solar_mega.checkpoint.command import convert

    tp = "2" if os.environ["WORLD_SIZE"] == "4" else "1"
    for src, dst, *flags in calls:
        layout = ["--tp", tp, "--pp", tp] if "megatron" in flags else []
        convert([str(src), str(dst), *flags, *layout])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_family("mistral_head_dim", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def both(source, tmp_path_factory):
    """Written by four ranks and read by one, and the other way round."""
    four, one = tmp_path_factory.mktemp("four"), tmp_path_factory.mktemp("one")
    there, back = ["--to", "megatron", "--layer-map", "dus:1"], ["--to", "hf", "--shard-size", "30KB"]
    run_ranks(_convert, 4, [source, four / "megatron", *there])
    run_ranks(
        _convert,
        1,
        [source, one / "megatron", *there],
        [four / "megatron", four / "back", *back],
        [source, one / "narrow", "--to", "megatron", "--dtype", "bf16"],
        [one / "narrow", one / "narrow_back"],
    )
    run_ranks(_convert, 4, [one / "megatron", one / "back", *back])
    return {"four to one": four, "one to four": one}


@pytest.fixture(scope="module", params=["four to one", "one to four"])
def converted(request, both):
    return both[request.param]


def test_there_and_back_is_bit_identical(source, converted):
    layer_map = LayerMap.parse("dus:1", 4)
    back = HFDirectory(converted / "back")
    report = verify(HFDirectory(source), back, layer_map)
    assert report.ok, report.describe()
    assert back.num_layers == 6 and len(back.tensors.files) > 2
    grown = transformers_logits(converted / "back")
    assert torch.isfinite(grown).all()
    lineage = json.loads((converted / "back" / "lineage.json").read_text())
    assert lineage["parents"][0]["path"].endswith("step-00000000")


def test_the_checkpoint_verifies_against_its_source(source, converted):
    from solar_mega.checkpoint.verify_megatron import verify_export, verify_import

    path = CheckpointStore(converted / "megatron").latest()
    src, layer_map = HFDirectory(source), LayerMap.parse("dus:1", 4)
    report = verify_import(src, path, layer_map)
    assert report.ok, report.describe()
    assert report.tensors == len(HFDirectory(converted / "back").tensors.infos)
    wrong = verify_import(src, path, LayerMap.parse("0,1,2,3,2,3", 4))
    assert wrong.difference is not None and wrong.difference.name.startswith("model.layers.3.")
    assert not verify_import(src, path, LayerMap.parse("identity", 4)).ok
    assert "expected BF16" in verify_import(src, path, layer_map, "BF16").describe()
    identity = LayerMap.parse("identity", 6)
    assert verify_export(path, HFDirectory(converted / "back"), identity).ok
    assert not verify_export(path, HFDirectory(converted / "back"), LayerMap.parse("0,2,1,3,4,5", 6)).ok
    assert not verify_export(path, src, identity).ok


def test_inspect_says_what_it_is(source, converted):
    path = CheckpointStore(converted / "megatron").latest()
    content = describe_megatron(path)
    held = sum(info.elements for info in HFDirectory(converted / "back").tensors.infos.values())
    assert content["complete"] and content["layers"] == 6 and content["parameters"] == held
    assert content["dtypes"] == {"float32": held} and content["optimizer"] is False
    assert content["lineage"]["layer_map"]["spelling"] == "dus:1"
    assert read_run_state(path).hf_config["num_hidden_layers"] == 6


def _faults(source, root):
    """Damages checkpoints one way after another; returns the messages of rank 0."""
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.megatron import load_checkpoint, save_checkpoint
    from solar_mega.model.architecture import Architecture
    from tests.checkpoint import training

    hf = HFDirectory(source)
    arch = Architecture.from_hf(hf.config)
    messages = {}

    def failing(name, action):
        with pytest.raises(UserError) as caught:
            action()
        messages[name] = str(caught.value)

    with layout(distributed_optimizer=True) as parallel:
        run = training.start(arch, parallel, "fp32-dist", hf.tensors, arch, LayerMap.parse("identity", 4))
        store = CheckpointStore(root / "store")
        good = save_checkpoint(store, run.chunks, run.optimizer, run.state(1))
        weights = save_checkpoint(CheckpointStore(root / "weights"), run.chunks, None, run.state(1))
        before = [p.clone() for c in run.chunks for p in c.parameters()]

        def damaged(name, change):
            copy = root / name
            shutil.copytree(good, copy)
            change(copy)
            failing(name, lambda: load_checkpoint(copy, run.chunks, run.optimizer))

        def cut(file):
            os.truncate(file, file.stat().st_size - 7)

        def garbage(file):
            file.write_bytes(b"\x80\x04garbage" + bytes(file.stat().st_size - 9))

        damaged("missing", lambda path: (path / "__0_0.distcp").unlink())
        damaged("truncated", lambda path: cut(path / "__0_1.distcp"))
        damaged("unfinished", lambda path: (path / "run_state.json").unlink())
        damaged("bad_json", lambda path: (path / "run_state.json").write_text("{"))
        damaged("bad_metadata", lambda path: garbage(path / ".metadata"))
        damaged("bad_common", lambda path: garbage(path / "common.pt"))
        failing("absent", lambda: load_checkpoint(root / "nowhere", run.chunks, None))
        failing("no_optimizer", lambda: load_checkpoint(weights, run.chunks, run.optimizer))
        other = training.start(arch, parallel, "bf16-dist")
        load_checkpoint(good, other.chunks, None)
        fresh = LayerMap(4, (0, 1, 2, None))
        failing("fresh", lambda: load_checkpoint(good, run.chunks, None, fresh))
        failing("fresh_hf", lambda: load_weights(run.chunks, hf.tensors, arch, fresh, parallel))
        failing("depth", lambda: load_checkpoint(good, run.chunks, None, LayerMap.parse("dus:1", 4)))
        narrow = Architecture.from_hf({**hf.config, "intermediate_size": 32})
        misfit = training.start(narrow, parallel, "fp32-dist")
        failing("shapes", lambda: load_checkpoint(good, misfit.chunks, None))
        for parameter, kept in zip((p for c in run.chunks for p in c.parameters()), before, strict=True):
            assert torch.equal(parameter, kept)

        # A full disk: no file may grow beyond a size that the small files stay below.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            failing("full", lambda: save_checkpoint(store, run.chunks, run.optimizer, run.state(2)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.steps() == [1] and store.latest() == good
        assert sorted(p.name for p in store.root.iterdir()) == ["latest", "step-00000001"]
        load_checkpoint(good, run.chunks, run.optimizer)
        save_checkpoint(store, run.chunks, run.optimizer, run.state(3))
        assert store.steps() == [1, 3]
    with layout(distributed_optimizer=False) as parallel:
        plain = training.start(arch, parallel, "bf16")
        failing("kind", lambda: load_checkpoint(good, plain.chunks, plain.optimizer))
    return messages


FAULTS = {
    "missing": ["__0_0.distcp is missing"],
    "truncated": ["__0_1.distcp has", "written with"],
    "unfinished": ["run_state.json", "not finished"],
    "bad_json": ["run_state.json is damaged"],
    "bad_metadata": ["damaged"],
    "bad_common": ["damaged"],
    "absent": ["nowhere does not exist"],
    "no_optimizer": ["weights only"],
    "fresh": ["target layers 3 are fresh"],
    "fresh_hf": ["3", "fresh"],
    "depth": ["6 layers", "the model has 4"],
    "shapes": ["has shape", "the model needs"],
    "full": ["step-00000002", "would be larger", "older ones are untouched"],
    "kind": ["holds weights in float32", "trains bfloat16", "train.precision"],
}


@pytest.fixture(scope="module")
def messages(source, tmp_path_factory):
    return run_ranks(_faults, 1, source, tmp_path_factory.mktemp("faults"))[0]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(messages, name):
    for words in FAULTS[name]:
        assert words in messages[name], messages[name]
    assert len(messages[name].splitlines()) <= 20


def run_cli(*arguments):
    command = [sys.executable, "-m", "solar_mega", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy whose config.json says something else."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**HFDirectory(source).config, **changes}))
    return target


BAD = {
    "unsupported architecture": (
        dict(architectures=["FalconForCausalLM"], model_type="falcon"),
        [],
        ["FalconForCausalLM", "supported: LlamaForCausalLM, MistralForCausalLM"],
    ),
    "rope": (
        dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        [],
        ["rope_type = 'yarn'", "supported: default, linear, llama3"],
    ),
    "heads and vocabulary by tp": ({}, ["--tp", "7"], ["4 attention heads", "vocabulary of 96"]),
    "layers by pp": ({}, ["--pp", "3"], ["does not divide", "4 layers"]),
    "missing tensors": (dict(num_hidden_layers=5), [], ["model.layers.4.mlp.down_proj.weight is missing"]),
    "wrong shapes": (
        dict(intermediate_size=50, vocab_size=97),
        [],
        ["mlp.gate_proj.weight has shape [48, 32]; config.json says [50, 32]", "embed_tokens"],
    ),
    "map": ({}, ["--layer-map", "dus:4"], ["m = 4"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(source, tmp_path, name):
    from solar_mega.checkpoint.command import convert

    changes, flags, says = BAD[name]
    path = edited(source, tmp_path / "model", **changes)
    with pytest.raises(UserError) as caught:
        convert([str(path), str(tmp_path / "out"), "--to", "megatron", *flags])
    for words in says:
        assert words in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 24
    assert not (tmp_path / "out").exists()


def test_the_command_line_exits_with_two_and_no_traceback(source, tmp_path):
    path = edited(source, tmp_path / "model", architectures=["FalconForCausalLM"])
    done = run_cli("convert", path, tmp_path / "out", "--to", "megatron")
    assert done.returncode == 2
    assert "FalconForCausalLM" in done.stderr and "Traceback" not in done.stderr


def test_verify_exits_with_one_and_names_the_tensor(source, both, tmp_path, capsys):
    """One bit of one weight flipped on the disk, in files of the right size."""
    from solar_mega.checkpoint.command import verify as verb

    copy = tmp_path / "megatron"
    shutil.copytree(both["four to one"] / "megatron", copy)
    assert verb([str(source), str(copy), "--layer-map", "dus:1"]) == 0
    path = CheckpointStore(copy).latest()
    first_row = HFDirectory(source).tensors.read("model.layers.2.self_attn.o_proj.weight")[0].numpy()
    needle = first_row[: len(first_row) // 2].tobytes()  # written by two ranks, half a row each
    flipped = 0
    for file in path.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        at = data.find(needle)
        if at >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            flipped += 1
    assert flipped
    assert verb([str(source), str(copy), "--layer-map", "dus:1"]) == 1
    assert "self_attn.o_proj.weight at [0, 0]" in capsys.readouterr().out


def test_a_changed_dtype_is_kept_and_verified(source, both):
    from solar_mega.checkpoint.command import verify as verb

    megatron, hf = both["one to four"] / "narrow", both["one to four"] / "narrow_back"
    assert HFDirectory(hf).config["dtype"] == "bfloat16"
    assert verb([str(source), str(megatron), "--dtype", "bf16"]) == 0
    assert verb([str(source), str(hf), "--dtype", "bf16"]) == 0
    assert verb([str(megatron), str(hf)]) == 0
    assert verb([str(source), str(hf)]) == 1
