"""Conversions on disk: every bit there and back; full, read-only and suddenly ended."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.artifact.hf import HFDirectory
from tests.distributed import ROOT
from tests.families import make_family


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """6 layers, so that 1, 2 and 3 stages divide them."""
    return make_family("mistral_head_dim", tmp_path_factory.mktemp("source"), layers=6)


def test_round_trip_keeps_the_hash_of_the_weights(source, tmp_path):
    assert run("convert", source, tmp_path / "megatron", "--to", "megatron", "--tp", 2, "--pp", 3) == 0
    assert run("convert", tmp_path / "megatron", tmp_path / "back", "--shard-size", "40KB") == 0
    there = json.loads((tmp_path / "megatron" / "step-00000000" / "run_state.json").read_text())
    back = json.loads((tmp_path / "back" / "lineage.json").read_text())
    mine = there["state"]["lineage"]["weights_hash"]
    assert mine.startswith("sha256:") and back["config"]["weights_hash"] == mine
    infos = HFDirectory(source).tensors
    from solar_mega.artifact.digest import tensor_digest, weights_hash

    assert weights_hash({name: tensor_digest(infos.read(name)) for name in infos.infos}) == mine


def test_logits_of_both_forms(source, tmp_path, capsys):
    made = tmp_path / "pro"
    assert run("convert", source, made, "--to", "megatron", "--layer-map", "llama-pro:3") == 0
    capsys.readouterr()
    assert run("verify", source, made, "--layer-map", "llama-pro:3", "--logits") == 0
    assert "the source's, bit for bit" in capsys.readouterr().out
    assert run("convert", made, tmp_path / "back", "--layer-map", "dus:2") == 0
    assert run("verify", made, tmp_path / "back", "--layer-map", "dus:2", "--logits") == 0
    assert "the two forms differ by at most" in capsys.readouterr().out


def test_nans_are_bits_like_others(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    from safetensors.torch import load_file, save_file

    shard = sorted(copy.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    for tensor in tensors.values():
        tensor.view(-1)[::3] = float("nan")
        tensor.view(-1).view(torch.int32)[3] = 0x7FC12345  # a NaN with a payload
        tensor.view(-1)[1] = -0.0
    save_file(tensors, shard, metadata={"format": "pt"})
    assert run("convert", copy, tmp_path / "megatron", "--to", "megatron", "--layer-map", "dus:2") == 0
    assert run("verify", copy, tmp_path / "megatron", "--layer-map", "dus:2") == 0
    assert run("convert", tmp_path / "megatron", tmp_path / "back") == 0
    assert run("verify", copy, tmp_path / "back", "--layer-map", "dus:2") == 0


def test_a_full_disk_leaves_nothing(source, tmp_path):
    """A limit on file sizes answers as a full disk does."""
    assert run("convert", source, tmp_path / "megatron", "--to", "megatron") == 0
    for words in ((source, "--to", "megatron"), (tmp_path / "megatron", "--to", "hf")):
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
            "from solar_mega.__main__ import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "convert", str(words[0]), str(tmp_path / "x"), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment())
        assert done.returncode == 2 and "nothing unfinished was left behind" in done.stderr, done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_read_only_target(source, tmp_path):
    """A file system of its own, mounted read-only in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o ro,size=50M tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run([*enter, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    for flags in ("--to megatron", "--to hf"):
        command = f"{mount} && exec {sys.executable} -m solar_mega convert {source} {disk}/x {flags}"
        done = subprocess.run([*enter, command], capture_output=True, text=True, cwd=ROOT, env=_environment())
        assert done.returncode == 2 and "the file system is read-only" in done.stderr, done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_kills_leave_nothing_half_done():
    """One kill of each route at a random point; `tests/campaigns/kill_convert.py` does many."""
    command = [sys.executable, "-m", "tests.campaigns.kill_convert", "--kills", "1", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
