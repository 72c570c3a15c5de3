"""convert, verify and inspect as commands: every direction, exit codes, and errors before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from solar_mega.__main__ import main
from tests.families import make_family

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """6 layers, llama3 rope, tied embeddings, several shards."""
    return make_family("llama3", tmp_path_factory.mktemp("source"), layers=6)


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*words: object, ranks: int = 1) -> subprocess.CompletedProcess:
    """A command in processes of its own, as Megatron's groups want."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, "-m", "solar_mega", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def flip_a_bit_of_the_last_weight(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[-1]
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def test_grow_verify_inspect(source, tmp_path, capsys):
    grown = tmp_path / "grown"
    code, out, err = run(capsys, "convert", source, grown, "--layer-map", "dus:2", "--shard-size", "30KB")
    assert code == 0
    assert "8 layers from 6" in out and "layer distance 1" in out  # the map is drawn
    assert "convert" not in err and "ETA" not in out  # progress stays on stderr
    assert f"solar-mega verify {source} {grown} --layer-map dus:2" in out

    code, out, _ = run(capsys, "verify", source, grown, "--layer-map", "dus:2")
    assert code == 0 and out.startswith("equal: ") and "bit for bit" in out

    code, out, _ = run(capsys, "verify", source, grown, "--layer-map", "dus:1")
    assert code == 1 and "DIFFERENT" in out

    code, out, _ = run(capsys, "inspect", grown, "--json")
    content = json.loads(out)
    assert code == 0 and content["complete"] and content["layers"] == 8
    code, out, _ = run(capsys, "inspect", grown)
    assert code == 0 and "convert --layer-map dus:2" in out and "LlamaForCausalLM" in out

    flip_a_bit_of_the_last_weight(grown)
    code, out, _ = run(capsys, "verify", source, grown, "--layer-map", "dus:2")
    assert code == 1 and "first differing tensor: model." in out

    (sorted(grown.glob("*.safetensors"))[0]).unlink()
    code, out, _ = run(capsys, "inspect", grown)
    assert code == 1 and "complete" in out and "NO" in out


def test_cast_is_verified_with_the_same_dtype(source, tmp_path, capsys):
    target = tmp_path / "half"
    assert run(capsys, "convert", source, target, "--dtype", "bf16")[0] == 0
    assert run(capsys, "verify", source, target, "--dtype", "bf16")[0] == 0
    assert run(capsys, "verify", source, target)[0] == 1
    assert json.loads(run(capsys, "inspect", target, "--json")[1])["dtypes"].keys() == {"BF16"}


def test_dry_runs_write_nothing(source, tmp_path, capsys):
    for to in ("hf", "megatron"):
        target = tmp_path / to
        code, out, err = run(
            capsys, "convert", source, target, "--to", to, "--layer-map=stack:2", "--dry-run"
        )
        assert code == 0, err
        assert "would write" in out and "12 layers" in out
        assert not target.exists()


def test_megatron_and_back_is_bit_identical(source, tmp_path, capsys):
    """Written by four ranks on TP2 x PP2, grown on the way in; read back by one process."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    words = ("convert", source, megatron, "--to", "megatron", "--layer-map", "dus:2", "--tp", 2, "--pp", 2)
    done = command(*words, ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("8 layers from 6") == 1  # one rank speaks

    code, out, _ = run(capsys, "inspect", megatron, "--json")
    content = json.loads(out)
    assert code == 0 and content["layers"] == 8 and not content["optimizer"]
    assert {name: content["parallel"][name] for name in ("tp", "pp")} == {"tp": 2, "pp": 2}

    done = command("convert", megatron, back)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(capsys, "verify", source, back, "--layer-map", "dus:2")[0] == 0

    import torch
    from transformers import AutoModelForCausalLM

    grown = tmp_path / "grown"
    assert run(capsys, "convert", source, grown, "--layer-map", "dus:2")[0] == 0
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        left, right = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (back, grown))
    assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layer-map", "dus:6"], "m must be from 0 to 5"),
        (["--layer-map", "dus:-1"], "dus:-1"),
        (["--layer-map", "dsu:2"], "dsu:2"),
        (["--dtype", "int8"], "--dtype int8: must be one of fp32, bf16, fp16"),
        (["--shard-size", "big"], "--shard-size = 'big' is not a size"),
        (["--to", "gguf"], "--to gguf: must be one of hf, megatron"),
        (["--tp", "2"], "--tp and --pp are for Megatron checkpoints"),
        (["--to", "megatron", "--tp", "3"], "parallel.tp = 3 does not divide the model's 4 attention heads"),
        (["--to", "megatron", "--pp", "4"], "parallel.pp"),
        (["--zero-copy"], "--zero-copy is from a Megatron checkpoint"),
        (["--optimizer", "drop"], "--optimizer is from a Megatron checkpoint"),
        (["--hf-config", "x"], "--hf-config belongs to a Megatron checkpoint"),
        (["--to", "megatron", "--dtype", "fp16"], "--dtype fp16 is for Hugging Face directories"),
    ],
)
def test_bad_requests_end_before_any_work(source, tmp_path, capsys, words, complaint):
    target = tmp_path / "target"
    code, _, err = run(capsys, "convert", source, target, *words)
    assert code == 2 and complaint in err and "Traceback" not in err
    assert not target.exists()


def test_bad_places(source, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("mine")
    for words, complaint in (
        ((source, full), "is not empty"),
        ((source, full, "--to", "megatron"), "is not empty"),
        ((source, source), "the same directory"),
        ((tmp_path / "absent", tmp_path / "x"), "is not a directory"),
        ((full, tmp_path / "x"), "neither config.json"),
    ):
        code, _, err = run(capsys, "convert", *words)
        assert code == 2 and complaint in err, err
    assert (full / "precious").read_text() == "mine" and not (tmp_path / "x").exists()
    code, _, err = run(capsys, "inspect", full)
    assert code == 2 and "neither config.json" in err


def test_unsupported_architecture_names_the_supported_ones(source, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    (other / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "convert", other, tmp_path / "x", "--to", "megatron")
    assert code == 2 and "FalconForCausalLM" in err and "LlamaForCausalLM" in err


def test_truncated_shard(source, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(source, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 8)
    for to in ("hf", "megatron"):
        code, _, err = run(capsys, "convert", broken, tmp_path / "x", "--to", to)
        assert code == 2 and shard.name in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()
