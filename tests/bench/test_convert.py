"""The converter's benchmark: what it generates, and one small run."""

import json

import pytest
import torch

from solar_mega.artifact.hf import HFDirectory
from solar_mega.bench.checkpoint import generate
from solar_mega.bench.convert import ConvertBench, mergekit_recipe, run
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError

SMALL = dict(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=64, shards=2, layer_map="dus:0")


def test_generated_tensors_are_of_the_shape_asked_for_and_all_different(tmp_path):
    options = ConvertBench(tmp_path, **SMALL)
    total = generate(tmp_path / "made", options)
    made = HFDirectory(tmp_path / "made")
    made.check_weights()
    assert len(made.tensors.files) == 2 and made.tensors.total_bytes == total
    tensors = [made.tensors.read(name) for name in made.tensors.infos]
    assert all(t.dtype == torch.bfloat16 and 0.01 < t.float().std() < 0.04 for t in tensors)
    assert len({t.view(torch.int16).numpy().tobytes() for t in tensors}) == len(tensors)


def test_recipe_for_mergekit():
    text = mergekit_recipe("SOURCE", LayerMap.parse("dus:2", 6))
    assert text.count("model: SOURCE") == 2
    assert "layer_range: [0, 4]" in text and "layer_range: [2, 6]" in text
    with pytest.raises(UserError, match="only copy"):
        mergekit_recipe("SOURCE", LayerMap.parse("llama-pro:2", 6))


def test_a_small_run(tmp_path, capsys):
    report = run(ConvertBench(tmp_path / "work", **SMALL, routes=("cp",), out=tmp_path / "out.json"))
    assert not (tmp_path / "work").exists()
    assert json.loads((tmp_path / "out.json").read_text()) == report
    grow, copy = report["routes"]["grow"], report["routes"]["cp"]
    assert grow["output_bytes"] == copy["output_bytes"] > report["source_bytes"]
    assert "x cp" in capsys.readouterr().out
    with pytest.raises(UserError, match="tar"):
        run(ConvertBench(tmp_path / "other", routes=("tar",)))
