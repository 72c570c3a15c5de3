"""`bench dpo-step` at toy size."""

import json
import math

import pytest

from solar_mega.__main__ import main

TOY = [
    "--layers",
    "2",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--vocab",
    "128",
    "--length",
    "16",
    "--pairs",
    "2",
    "--steps",
    "2",
    "--rounds",
    "1",
]


def test_both_sides_take_the_same_steps(tmp_path, capsys):
    pytest.importorskip("trl", reason="needs trl (pip install 'solar-mega[parity]')")
    out = tmp_path / "dpo-step.json"
    assert main(["bench", "dpo-step", *TOY, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    ours, theirs = (report["sides"][side] for side in ("solar_mega", "trl"))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours["peak_bytes"] > 0 and report["peak_of_ours_to_theirs"] > 0
    assert "peak of ours" in capsys.readouterr().out
