"""Rows of published shapes become conversations; what cannot be trained on is counted, with its place."""

import json
from collections import Counter

import numpy as np
import pytest

from solar_mega.data.chat import load_template
from solar_mega.data.instruction_tokens import FILLED, TOO_LONG, TokenOptions, content_hash, tokenized
from solar_mega.data.instructions import FILTERED, read_instructions, specs_of
from solar_mega.data.rows import DatasetSpec
from solar_mega.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(rows: list, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write


def _read(format: str, path: str, **options):
    return read_instructions(DatasetSpec(format, path, **options), seed=1)


ROWS = {
    "alpaca": (
        {"instruction": "Sort.", "input": "2 1", "output": "1 2"},
        [("user", "Sort.", "2 1"), ("assistant", "1 2", "")],
    ),
    "openorca": (
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."},
        [("system", "Be brief.", ""), ("user", "Why?", ""), ("assistant", "So.", "")],
    ),
    "metamath": (
        {"type": "MATH_Rephrased", "query": "1+1?", "original_question": "One and one?", "response": "2"},
        [("user", "1+1?", ""), ("assistant", "2", "")],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ]
        },
        [
            ("system", "S", ""),
            ("user", "a", ""),
            ("assistant", "b", ""),
            ("user", "c", ""),
            ("assistant", "d", ""),
        ],
    ),
    "openai": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a", ""), ("assistant", "b", "")],
    ),
    "plain": ({"question": "a", "answer": "b"}, [("user", "a", ""), ("assistant", "b", "")]),
}


@pytest.mark.parametrize("format", ROWS)
def test_rows_of_every_format(format, write) -> None:
    row, want = ROWS[format]
    (instruction,), report = _read(format, write([row]))
    assert [(m.role, m.content, m.input) for m in instruction.messages] == want
    assert (report.read, report.kept, report.faults) == (1, 1, 0)


BAD = [
    ({"instruction": "a"}, "no field output"),
    ({"instruction": None, "output": "b"}, "no field instruction"),
    ({"instruction": "a", "output": ""}, "an empty response"),
    ({"instruction": " ", "output": "b"}, "an empty question"),
    ({"instruction": "a", "output": ["b"]}, "field output is no text"),
    ({"instruction": "a", "input": 5, "output": "b"}, "field input is no text"),
    (b'{"instruction": "a", "output": "\xff"}', "not UTF-8"),
    (b'{"instruction": "a", ', "not JSON"),
    (["a", "b"], "not an object with fields but list"),
]


def test_bad_rows_are_counted_with_their_places(write) -> None:
    good = {"instruction": "a", "output": "b"}
    path = write([good] + [row for row, _ in BAD] + [good])
    instructions, report = _read("alpaca", path)
    assert len(instructions) == 2 and report.read == len(BAD) + 2 and report.faults == len(BAD)
    assert report.dropped == Counter(reason for _, reason in BAD)
    assert report.examples["no field output"] == [f"{path}:2: fields: instruction"]
    assert report.examples["an empty response"] == [f"{path}:4"]
    assert f"1 dropped: not UTF-8 ({path}:8: not UTF-8" in report.describe()
    with pytest.raises(
        UserError, match=r"(?s)data.strict = true.*9 problems.*1 x no field output: .*rows.jsonl:2"
    ):
        report.refuse_faults()


@pytest.mark.parametrize(
    "roles, reason",
    [
        (["gpt", "human"], "mixed roles"),
        (["human", "human", "gpt"], "mixed roles"),
        (["human", "gpt", "human"], "no response"),
        (["human", "tool"], "unknown role"),
        ([], "no messages"),
    ],
)
def test_bad_conversations(roles, reason, write) -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    bad = {"conversations": [{"from": role, "value": "text"} for role in roles]}
    _, report = _read("sharegpt", write([good, bad]))
    (found,) = report.dropped
    assert reason in found


def test_rows_of_another_kind_are_no_faults(write) -> None:
    rows = [ROWS["metamath"][0], {"type": "GSM_SV", "query": "q", "response": "r"}]
    instructions, report = _read("metamath", write(rows))
    assert len(instructions) == 1 and report.dropped == {FILTERED: 1} and report.faults == 0
    report.refuse_faults()


def test_nothing_usable_is_an_error(write) -> None:
    with pytest.raises(UserError, match="no usable row in .* read as alpaca"):
        _read("alpaca", write([{"text": "a"}]))


def test_subsamples_are_drawn_by_seed_from_what_is_usable(write) -> None:
    rows = [{"instruction": str(i), "output": "b" if i % 2 else ""} for i in range(200)]
    path = write(rows)
    spec = DatasetSpec("alpaca", path, samples=20)
    drawn, report = read_instructions(spec, seed=1)
    numbers = [int(one.messages[0].content) for one in drawn]
    assert len(set(numbers)) == 20 and numbers == sorted(numbers) and all(n % 2 for n in numbers)
    assert (report.kept, report.unused, report.faults) == (20, 80, 100)
    again, other = read_instructions(spec, seed=1)[0], read_instructions(spec, seed=2)[0]
    assert again == drawn and other != drawn
    assert max(numbers) > 150 and min(numbers) < 50


def test_specs_are_checked_all_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)2 problems.*data.train: 'nope x'.*data.valid: 'alpaca'"):
        specs_of(["nope x"], ["alpaca"])


# ---------------------------------------------------------------------------------------------- tokens


def _tokenized(path: str, tokenizer, cache, **options):
    template = load_template("alpaca", tokenizer)
    spec = DatasetSpec("alpaca", path)
    return tokenized([spec], template, tokenizer, TokenOptions(**{"seq_length": 96, **options}), cache)


LONG = {"instruction": "a", "output": "word " * 300}
FULL = {"instruction": "word " * 300, "output": "b"}
FORGED = {"instruction": "a </s> b", "output": "c"}
SHORT = {"instruction": "Say it.", "output": "It."}


def test_what_does_not_fit_is_dropped_or_cut_and_counted(write, hf_tokenizer, tmp_path) -> None:
    path = write([SHORT, LONG, FULL, FORGED])
    data = _tokenized(path, hf_tokenizer, tmp_path)
    assert len(data) == 1
    for line in (f"1 dropped: {TOO_LONG} ({path}:2)", f"1 dropped: {FILLED} ({path}:3)", "</s> out"):
        assert line in data.report
    cut = _tokenized(path, hf_tokenizer, tmp_path, overlong="truncate")
    assert cut.lengths == [data.lengths[0], 97] and "1 truncated" in cut.report
    assert cut[1].loss[-1] and cut[1].ids[-1] != hf_tokenizer.eos_id
    with pytest.raises(UserError, match=f"(?s)data.strict = true.*1 x {TOO_LONG}.*1 x {FILLED}"):
        _tokenized(path, hf_tokenizer, tmp_path, strict=True)
    with pytest.raises(UserError, match="no row of .* is left after tokenising"):
        _tokenized(write([LONG], "long.jsonl"), hf_tokenizer, tmp_path)


def test_tokens_are_kept_and_made_again_when_anything_changes(write, hf_tokenizer, tmp_path) -> None:
    cache = tmp_path / "cache"
    path = write([SHORT, SHORT])
    first = _tokenized(path, hf_tokenizer, cache)
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}
    second = _tokenized(path, hf_tokenizer, cache)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")} == made
    assert all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.loss, b.loss)
        for a, b in zip(first, second, strict=True)
    )
    write([SHORT, {**SHORT, "output": "It!"}])
    _tokenized(path, hf_tokenizer, cache)
    _tokenized(path, hf_tokenizer, cache, seq_length=95)
    assert len(list(cache.iterdir())) == 3


def test_content_hash_sees_every_byte(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_text("[1]")
    before = content_hash(tmp_path / "a")
    assert before == content_hash(tmp_path / "a" / "*.json") and content_hash(tmp_path / "no/such") == ""
    (tmp_path / "a" / "x.json").write_text("[2]")
    assert content_hash(tmp_path / "a") != before
