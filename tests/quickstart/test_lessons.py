"""The self-made data sets: the same every time, in the fields that the readers of the real ones take, with
answers that are right."""

import json

import pytest

from solar_mega.data.instructions import read_instructions
from solar_mega.data.preferences import PairOptions, read_pairs
from solar_mega.data.rows import DatasetSpec
from solar_mega.quickstart.lessons import write_lessons


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    write_lessons(folder)
    return folder


def test_the_same_every_time(lessons, tmp_path):
    write_lessons(tmp_path)
    for file in lessons.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    "format, file, rows", [("alpaca", "alpaca_gpt4.json", 400), ("openorca", "openorca.jsonl", 400)]
)
def test_every_instruction_is_read(lessons, format, file, rows):
    found, report = read_instructions(DatasetSpec(format, str(lessons / file)), seed=1)
    assert len(found) == rows and report.faults == 0


@pytest.mark.parametrize(
    "format, file, rows",
    [("ultrafeedback_allenai", "ultrafeedback.jsonl", 240), ("orca_dpo_pairs", "orca_dpo.jsonl", 120)],
)
def test_every_pair_is_read_and_prefers_something(lessons, format, file, rows):
    found, _ = read_pairs(DatasetSpec(format, str(lessons / file)), PairOptions(strict=True))
    assert len(found) == rows
    assert all(pair.chosen != pair.rejected for pair in found)


def test_recorded_answers_make_both_synthetic_sets(lessons, tmp_path):
    pytest.importorskip("math_verify")
    from solar_mega.data.generators import ReplayGenerator
    from solar_mega.data.synthesize import synthesize

    replay = ReplayGenerator(lessons / "math_replay.jsonl")
    report = synthesize(DatasetSpec("math", str(lessons / "math.jsonl")), replay, tmp_path)
    assert report.kept == {"rephrased": 106}  # of 120, every eighth wrong unless asked twice
    assert report.dropped == {"rephrased: another answer than the seed's": 14}
    pairs, _ = read_pairs(DatasetSpec("plain", str(tmp_path / "alignment.jsonl")), PairOptions(strict=True))
    assert len(pairs) == 106


def test_mathematics_is_right(lessons):
    rows = [json.loads(line) for line in (lessons / "math.jsonl").read_text().splitlines()]
    sums = [row for row in rows if row["problem"].startswith("What is")]
    assert 20 < len(sums) < len(rows) == 120
    for row in sums:
        a, b = row["problem"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert f"\\boxed{{{int(a) + int(b)}}}" in row["solution"]
