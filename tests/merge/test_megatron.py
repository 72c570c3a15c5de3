"""Megatron checkpoints as models to merge: what comes out is the merge of their exports, bit for bit."""

import json
import os
import shutil

import pytest

from solar_mega.__main__ import main
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.lineage import read_lineage
from tests.distributed import run_ranks
from tests.families import make_family
from tests.merge.test_arithmetic import tensors

METHODS = {
    "linear": ("--method", "linear", "--weights", "0.3", "0.7"),
    "slerp": ("--method", "slerp", "--t-filters", "self_attn=0,1", "--t", "0.4"),
    "ties": ("--method", "ties", "--density", "0.4"),
}


def _convert(*calls):
    from solar_mega.checkpoint.command import convert

    tp = "2" if os.environ["WORLD_SIZE"] == "4" else "1"
    for words in calls:
        convert([*map(str, words), "--to", "megatron", "--tp", tp, "--pp", tp])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Of three models: the directory it comes from, its checkpoint (a and b on TP2 x PP2, the base on one
    rank) and that one's export."""
    import torch
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    source = {"base": make_family("mistral_head_dim", root / "base")}
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(source["base"])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        source[name] = root / name
        model.save_pretrained(source[name])
        shutil.copy(source["base"] / "config.json", source[name] / "config.json")
    run_ranks(_convert, 4, *((source[name], root / f"{name}-megatron") for name in "ab"))
    assert main(["convert", str(source["base"]), str(root / "base-megatron"), "--to", "megatron"]) == 0
    found = {}
    for name, directory in source.items():
        checkpoint, export = root / f"{name}-megatron", root / f"{name}-export"
        assert main(["convert", str(checkpoint), str(export), "--to", "hf"]) == 0
        found[name] = (directory, checkpoint, export)
    return found


def merged(models: dict, method: str, kind: int, out, *more: str) -> dict:
    words = ["merge", "--out", str(out), *METHODS[method], *more]
    words += ["--models", *(str(models[name][kind]) for name in "ab")]
    if method == "ties":
        words += ["--base", str(models["base"][kind])]
    assert main(words) == 0
    return tensors(out)


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_of_checkpoints_is_that_of_their_exports(models, tmp_path, method):
    ours = merged(models, method, 1, tmp_path / "checkpoints")
    theirs = merged(models, method, 2, tmp_path / "exports")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]), name
    config, expected = (HFDirectory(tmp_path / name).config for name in ("checkpoints", "exports"))
    assert config == expected
    lineage = read_lineage(tmp_path / "checkpoints")
    for name in "ab":
        (parent,) = [one for one in lineage.parents if one.path.startswith(str(models[name][1]))]
        assert parent.hash.startswith("run_state:sha256:")


def test_either_kind_beside_the_other(models, tmp_path):
    mixed = {"a": (models["a"][1],), "b": (models["b"][0],)}
    ours = merged(mixed, "slerp", 0, tmp_path / "mixed", "--threads", "3")
    theirs = merged(models, "slerp", 0, tmp_path / "directories")
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    report = json.loads((tmp_path / "mixed" / "merge_report.json").read_text())
    assert report["method"] == "slerp"


def test_faults_of_checkpoints_are_named(models, tmp_path, capsys):
    broken = shutil.copytree(models["a"][1], tmp_path / "broken")
    file = max(broken.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "empty").mkdir()
    words = ["merge", "--out", str(tmp_path / "out"), *METHODS["linear"], "--models"]
    assert main([*words, str(broken), str(models["b"][1])]) == 2
    assert str(broken) in capsys.readouterr().err
    assert main([*words, str(tmp_path / "empty"), str(models["b"][1])]) == 2
    assert "nor a complete Megatron checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
