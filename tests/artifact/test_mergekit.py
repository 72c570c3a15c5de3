"""The same recipes by mergekit and by us: the same tensors, bit for bit. Runs where mergekit is installed:
`mergekit-yaml` on the PATH, or named by SOLAR_MEGA_MERGEKIT."""

import os
import shutil
import subprocess

import pytest
import torch

from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.depth.layer_map import LayerMap
from tests.artifact.conftest import make_llama

MERGEKIT = os.environ.get("SOLAR_MEGA_MERGEKIT") or shutil.which("mergekit-yaml")
pytestmark = pytest.mark.skipif(not MERGEKIT, reason="mergekit is not installed")

SLICE = """
  - sources:
      - model: {model}
        layer_range: [{start}, {stop}]
"""
SCALED = """
        parameters:
          scale:
            - filter: o_proj
              value: {o_proj}
            - filter: down_proj
              value: {down_proj}
            - value: 1.0
"""


def recipe(model, slices):
    text = "slices:"
    for start, stop, *scales in slices:
        text += SLICE.format(model=model, start=start, stop=stop).rstrip()
        text += SCALED.format(o_proj=scales[0], down_proj=scales[1]).rstrip() if scales else ""
    return f"{text}\nmerge_method: passthrough\ndtype: bfloat16\n"


@pytest.mark.parametrize(
    ("slices", "spelling"),
    [
        ([(0, 4), (2, 6)], "dus:2"),
        ([(0, 6), (0, 6)], "stack:2"),
        ([(0, 3), (2, 3, 0.0, 0.0), (3, 6), (5, 6, 0.0, 0.0)], "llama-pro:2"),
        ([(0, 3), (1, 6, 0.3, 0.7)], "repeat:1-3+o_proj:0.3@3-8+down_proj:0.7@3-8"),
    ],
)
def test_passthrough_gives_the_same_tensors(tmp_path, slices, spelling):
    source = make_llama(tmp_path / "source", dtype=torch.bfloat16)
    (source / "tokenizer.json").unlink()  # the fixture's is not one, and mergekit looks into it
    (source / "special_tokens_map.json").unlink()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(source, slices))
    command = [MERGEKIT, path, tmp_path / "theirs", "--copy-tokenizer"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert (tmp_path / "theirs" / "config.json").exists(), done.stderr[-2000:]
    layer_map = LayerMap.parse(str(path), 6)
    assert layer_map == LayerMap.parse(spelling, 6)
    grow(HFDirectory(source), tmp_path / "ours", layer_map)
    theirs, ours = HFDirectory(tmp_path / "theirs"), HFDirectory(tmp_path / "ours")
    assert theirs.tensors.infos.keys() == ours.tensors.infos.keys()
    for name in ours.tensors.infos:
        assert torch.equal(theirs.tensors.read(name), ours.tensors.read(name)), name
    assert theirs.num_layers == ours.num_layers == len(layer_map)
