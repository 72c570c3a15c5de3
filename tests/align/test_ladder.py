"""sDPO on two rungs: each starts at ln 2 from the result of the one before, and can be taken up again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.align.ladder import easy_to_hard
from solar_mega.runtime.metrics import read_metrics


@pytest.fixture(scope="module")
def ladder(pair_inputs, tmp_path_factory):
    """(directory, words): two rungs of 6 steps each, with the last words of a prompt to repeat."""
    run = tmp_path_factory.mktemp("ladder") / "run"
    words = pair_inputs.words(
        run,
        "--ladder.chunks",
        f"plain {pair_inputs.first} rows=0:16 + plain {pair_inputs.first} rows=16:",
        f"plain {pair_inputs.second}",
        "--data.valid",
        f"plain {pair_inputs.valid}",
        "--data.epochs",
        "2",
    )
    threads = torch.get_num_threads()
    assert main(words) == 0
    torch.set_num_threads(threads)
    return run, words


def rows(run: Path, rung: int) -> list[dict]:
    return read_metrics(run / f"rung-{rung}" / "metrics.jsonl")


def test_each_rung_starts_as_its_own_reference(ladder):
    run, _ = ladder
    for rung in (1, 2):
        first = rows(run, rung)[0]
        assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert abs(first["val_rewards/margins"]) < 1e-6
        assert rows(run, rung)[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_second_rung_goes_on_from_the_first(ladder):
    """Its log-probs at the start are the first's at the end; both learn."""
    run, _ = ladder
    end, start = rows(run, 1)[-1], rows(run, 2)[0]
    for name in ("val_logps/chosen", "val_logps/rejected"):
        assert start[name] == pytest.approx(end[name], rel=1e-6)
    assert end["val_logps/chosen"] != pytest.approx(rows(run, 1)[0]["val_logps/chosen"], rel=1e-3)
    for rung in (1, 2):
        assert rows(run, rung)[-2]["loss"] < np.log(2) - 0.01


def test_lineage_names_the_rung_and_its_parent(ladder, pair_inputs):
    run, _ = ladder
    parents = []
    for rung in (1, 2):
        lineage = json.loads((run / f"rung-{rung}" / "hf" / "lineage.json").read_text())
        assert (lineage["config"]["rung"], lineage["config"]["rungs"]) == (rung, 2)
        parents.append(lineage["parents"][0])
    assert parents[0]["path"] == str(pair_inputs.model)
    assert parents[1]["path"] == str(run / "rung-1" / "hf")
    assert parents[1]["lineage"]["config"]["rung"] == 1
    assert (run / "hf").resolve() == run / "rung-2" / "hf"


def test_a_ladder_is_taken_up_at_the_rung_it_stopped_at(ladder, tmp_path, capsys):
    run, words = ladder
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True, ignore=shutil.ignore_patterns("rung-2"))
    state = json.loads((again / "ladder.json").read_text())
    assert (state["finished"], state["order"], state["accuracies"]) == (2, [0, 1], None)
    (again / "ladder.json").write_text(json.dumps({**state, "finished": 1}))
    weights = "hf/model.safetensors"
    before = (again / "rung-1" / weights).stat().st_mtime_ns
    words = [str(again) if word == str(run) else word for word in words]
    assert main(words) == 0
    assert "rung 1: done before" in capsys.readouterr().out
    assert (again / "rung-1" / weights).stat().st_mtime_ns == before
    assert (again / "rung-2" / weights).read_bytes() == (run / "rung-2" / weights).read_bytes()


def test_other_chunks_are_another_ladder(ladder, pair_inputs, capsys):
    run, words = ladder
    other = [
        f"plain {pair_inputs.valid}" if word == f"plain {pair_inputs.second}" else word for word in words
    ]
    assert main(other) == 2
    assert "is of a ladder on other chunks" in capsys.readouterr().err
    assert main([*words, "--checkpoint.resume", "never"]) == 2
    assert "already holds a ladder" in capsys.readouterr().err


def test_easy_to_hard_is_by_the_references_accuracy(pair_inputs, tmp_path):
    """One chunk has its preferences the other way round: the order follows from the first reference alone."""
    flipped = tmp_path / "flipped.jsonl"
    pairs = [json.loads(line) for line in pair_inputs.first.read_text().splitlines()]
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    flipped.write_text("".join(json.dumps(pair) + "\n" for pair in turned))
    chunks = ("--ladder.chunks", f"plain {flipped}", f"plain {pair_inputs.first}")
    words = pair_inputs.words(tmp_path / "run", *chunks, "--ladder.order", "easy_to_hard")
    assert main(words) == 0
    state = json.loads((tmp_path / "run" / "ladder.json").read_text())
    given, turned = state["accuracies"][1], state["accuracies"][0]
    assert given == pytest.approx(1 - turned)
    assert state["order"] == ([1, 0] if given > turned else [0, 1])
    chunk = json.loads((tmp_path / "run" / "rung-1" / "hf" / "lineage.json").read_text())["config"]["chunk"]
    assert chunk == chunks[1 + state["order"][0]]


def test_ties_keep_the_order_given():
    assert easy_to_hard((0.5, 0.7, 0.5, 0.9)) == (3, 1, 0, 2)
