"""The paper's tables beside results that `evaluate` wrote."""

import json
import math
from pathlib import Path

import pytest

from solar_mega.errors import UserError
from solar_mega.evaluate.paper_tables import COLUMNS, read_tables, tables
from solar_mega.evaluate.report import ModelResult, write_report
from solar_mega.evaluate.run import TaskScore
from solar_mega.evaluate.tasks import H6

TABLES = Path("configs/ablations/tables.toml")


def result(root: Path, model: str, scores: list[float]) -> ModelResult:
    rows = [
        TaskScore(name, title, "acc", value / 100, math.nan, 10, 1, 1, {})
        for (name, title), value in zip(H6.items(), scores, strict=True)
    ]
    return ModelResult(model, str(root / model / "hf"), tuple(rows))


def test_the_published_averages_are_averages():
    """A slip of the pen in one number would show in its row's H6."""
    for one in read_tables(TABLES):
        for row in one.rows:
            average = sum(row.published[1:]) / 6
            # Rounded scores and a truncated average (Cand. 2: 73.2917 became 73.28).
            assert row.published[0] == pytest.approx(average, abs=0.005 + 0.01), (one.title, row.name)


def test_our_figures_stand_below_the_published(tmp_path, capsys):
    write_report([result(tmp_path, "3_sft_v1", [10, 20, 30, 40, 50, 60])], tmp_path / "out")
    words = ["--results", str(tmp_path / "out/results.json"), "--root", str(tmp_path), "--note", "a toy"]
    assert tables([*words, "--out", str(tmp_path / "tables.md")]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    place = next(i for i, line in enumerate(lines) if line[:3] == ["SFT", "v1", "published"])
    assert lines[place][3:] == ["69.15", "67.66", "86.03", "65.88", "60.12", "82.95", "52.24"]
    assert lines[place + 1][:3] == ["Alpaca-GPT4", "ours", "35.00"]
    assert list(map(float, lines[place + 1][3:])) == [10, 20, 30, 40, 50, 60]
    assert "(a toy)" in shown and "no result of ours for" in shown and "3_sft_v1," not in shown
    assert "| SFT v1 | published | 69.15 |" in (tmp_path / "tables.md").read_text()


def test_bad_input(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text('[[table]]\ntitle = "T"\nrows = [{ name = "a", published = [1, 2], colour = 3 }]\n')
    with pytest.raises(UserError) as caught:
        read_tables(bad)
    message = str(caught.value)
    assert (
        "unknown key colour" in message and "must be 7 numbers" in message and "model are needed" in message
    )
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"path": "x"}]))
    with pytest.raises(UserError, match="not results of solar-mega evaluate"):
        tables(["--results", str(other), "--tables", str(TABLES.resolve())])


def test_columns_are_the_papers():
    assert COLUMNS == ("H6 (Avg.)", "ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K")
