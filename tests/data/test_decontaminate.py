"""Planted overlaps are found, whatever was done to them; unrelated text stays, byte for byte."""

import json
import random
from pathlib import Path

import pytest

from solar_mega.data.decontaminate import DecontaminateOptions, decontaminate, run
from solar_mega.data.overlap import NgramIndex, words_of
from solar_mega.data.sources import find_sources
from solar_mega.errors import UserError

VOCABULARY = [f"word{number}" for number in range(4000)]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(VOCABULARY, k=words)).capitalize() + "."


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> list[str]:
    draw = random.Random(1)
    return [sentence(draw, length) for length in (8, 12, 13, 20, 30, 60)] * 2


@pytest.fixture
def files(benchmark, tmp_path) -> tuple[Path, dict[int, str]]:
    """(training file, row -> what was planted there)."""
    draw = random.Random(2)
    ways = {
        "exact": lambda text: text,
        "cased": str.upper,
        "spaced": lambda text: "\n\t ".join(text.split()),
        "punctuated": lambda text: " -- ".join(text.rstrip(".").split()),
        "inside": lambda text: sentence(draw, 40) + " " + text + " " + sentence(draw, 40),
    }
    rows: list[dict] = [{"id": i, "text": sentence(draw, draw.randint(5, 80))} for i in range(400)]
    planted = [(way, make(text)) for text in benchmark for way, make in ways.items()]
    places = {}
    for way, text in planted:
        place = draw.randrange(len(rows))
        if place not in places:
            rows[place] = {"conversations": [{"from": "user", "value": text}], "n": 1}
            places[place] = way
    train = tmp_path / "train.jsonl"
    # Unusual but valid spacing must survive.
    train.write_text("".join(json.dumps(row, separators=(", ", " : ")) + "\n" for row in rows))
    tests = tmp_path / "bench" / "test.jsonl"
    tests.parent.mkdir()
    tests.write_text("".join(json.dumps({"question": text, "answer": "A"}) + "\n" for text in benchmark))
    return train, places


def options(train: Path, **changes) -> DecontaminateOptions:
    settings = dict(
        inputs=(str(train),), output=train.parent / "out", against=(train.parent / "bench",), workers=2
    )
    return DecontaminateOptions(**{**settings, **changes})


def decontaminated(o: DecontaminateOptions) -> tuple[dict, dict[int, dict]]:
    report = run(o, find_sources(o.inputs))
    removed = map(json.loads, (o.output / "removed.jsonl").read_text().splitlines())
    return report, {entry["row"]: entry for entry in removed}


@pytest.mark.parametrize("near", [0.0, 0.8])
def test_all_planted_overlaps_and_nothing_else(files, near):
    train, places = files
    before = train.read_bytes()
    report, removed = decontaminated(options(train, near=near))
    assert removed.keys() == places.keys() and len(set(places.values())) == 5
    assert report["rows"] == 400 and report["kept"] == 400 - len(places)
    assert all(entry["benchmark"].endswith(tuple("0123456789")) for entry in removed.values())
    kept = [line for row, line in enumerate(before.splitlines(True)) if row not in places]
    assert (train.parent / "out" / "train.jsonl").read_bytes() == b"".join(kept)
    assert train.read_bytes() == before


def test_a_changed_word_hides_no_near_duplicate(files, benchmark):
    train, places = files
    words = benchmark[3].split()
    words[len(words) // 2] = "changed"  # 10 and 9 words remain in a row: no 13-gram
    with open(train, "a") as stream:
        stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    _, removed = decontaminated(options(train))
    assert removed[400]["reason"] == "near-duplicate" and removed.keys() - places.keys() == {400}


def test_flan_tasks_are_found_by_their_text(tmp_path):
    flan = tmp_path / "flan.jsonl"
    rows = [
        {"inputs": "Solve this one:  a  problem of arithmetic.", "targets": "7", "task_name": "cot_gsm8k"},
        {"inputs": "Translate the word house.", "targets": "Haus", "task_name": "wmt16"},
    ]
    flan.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = tmp_path / "orca.jsonl"
    orca = [
        {"id": "cot.1", "system_prompt": "Be brief.", "question": "solve this one: a problem of arithmetic"},
        {"id": "flan.2", "system_prompt": "Be brief.", "question": "Translate the word house."},
        {"id": "flan.3", "question": "Finish it.", "task_name": "hellaswag:1.1.0"},
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in orca))
    report, removed = decontaminated(options(train, against=(), flan=(flan,)))
    assert {row: entry["reason"] for row, entry in removed.items()} == {0: "flan-task", 2: "flan-task"}
    assert report["kept"] == 1


def test_parquet_and_arrays_keep_their_form(files, benchmark):
    import pyarrow
    import pyarrow.parquet

    train, _ = files
    texts = ["nothing to see here at all, just some words of nobody's test", benchmark[4], "x"]
    table = pyarrow.table({"text": texts, "n": pyarrow.array([1, 2, 3], pyarrow.int16())})
    pyarrow.parquet.write_table(table, train.parent / "p.parquet")
    (train.parent / "a.json").write_text(json.dumps([{"instruction": text} for text in texts]))
    inputs = (str(train.parent / "p.parquet"), str(train.parent / "a.json"))
    decontaminated(options(train, inputs=inputs))
    kept = pyarrow.parquet.read_table(train.parent / "out" / "p.parquet")
    assert kept.schema == table.schema and kept["n"].to_pylist() == [1, 3]
    assert json.loads((train.parent / "out" / "a.json").read_text()) == [
        {"instruction": texts[0]},
        {"instruction": "x"},
    ]


def test_words_of_text():
    words = ["dont", "stop", "me", "find", "2", "words", "日", "本"]
    assert words_of("Don't  STOP-me, ﬁnd ２ words!\n日本") == words


def test_short_benchmark_texts_are_not_looked_for():
    index = NgramIndex.build([(0, [words_of("the answer is yes")])], 13)
    assert index.ngrams == 0 and index.find(words_of("the answer is yes")) is None


def test_bad_settings_are_listed_together(tmp_path):
    with pytest.raises(UserError) as caught:
        decontaminate(["--ngram", "1", "--near", "2"])
    text = str(caught.value)
    for expected in (
        "no training data",
        "--output is missing",
        "nothing to compare",
        "--ngram 1",
        "--near 2",
    ):
        assert expected in text


def test_flan_without_task_names_is_refused(tmp_path):
    flan = tmp_path / "flan.jsonl"
    flan.write_text('{"inputs": "a"}\n')
    train = tmp_path / "t.jsonl"
    train.write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match="needs the fields inputs and task_name; it has inputs"):
        run(options(train, against=(), flan=(flan,)), find_sources([str(train)]))
