"""Rows of each known data set to pairs, and everything that is no pair counted under its reason."""

import json

import pytest

from solar_mega.data.chat import Message
from solar_mega.data.preferences import FORMATS, PairOptions, normalized, read_pairs, read_prompts
from solar_mega.data.rows import DatasetSpec
from solar_mega.errors import UserError

ASKED = (Message("system", ""), Message("user", "What is 2+2?"))


def turns(*texts, keys=("role", "content"), roles=("user", "assistant"), system=None):
    messages = [] if system is None else [{keys[0]: "system", keys[1]: system}]
    return messages + [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def shares(*texts, **options):
    return turns(*texts, keys=("from", "value"), roles=("human", "gpt"), **options)


ROWS = {  # as the published files have them: (format, row)
    "orca, first revision": (
        "orca_dpo_pairs",
        {"system": "", "question": "What is 2+2?", "chatgpt": "4", "llama2-13b-chat": "5"},
    ),
    "orca": ("orca_dpo_pairs", {"system": "", "question": "What is 2+2?", "chosen": "4", "rejected": "5"}),
    "ultrafeedback, allenai": (
        "ultrafeedback_allenai",
        {
            "prompt": "What is 2+2?",
            "prompt_id": "abc",
            "chosen": turns("What is 2+2?", "4"),
            "rejected": turns("What is 2+2?", "5"),
            "messages": turns("What is 2+2?", "4"),
            "score_chosen": 8.0,
            "score_rejected": 4.0,
            "source": "evol_instruct",
        },
    ),
    "ultrafeedback, argilla": (
        "ultrafeedback_argilla",
        {
            "source": "sharegpt",
            "prompt": "What is 2+2?",
            "chosen": turns("What is 2+2?", "4"),
            "chosen-rating": 5.0,
            "chosen-model": "gpt-4",
            "rejected": turns("What is 2+2?", "5"),
            "rejected-rating": 2.0,
            "rejected-model": "alpaca-7b",
        },
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": shares("What is 2+2?"),
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ),
    "messages": (
        "openai",
        {
            "prompt": turns("What is 2+2?"),
            "chosen": turns("What is 2+2?", "4"),
            "rejected": turns("What is 2+2?", "5"),
        },
    ),
    "messages, responses alone": (
        "openai",
        {
            "messages": turns("What is 2+2?"),
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        },
    ),
    "openai's own": (
        "openai",
        {
            "input": {"messages": turns("What is 2+2?"), "tools": []},
            "preferred_output": [{"role": "assistant", "content": "4"}],
            "non_preferred_output": [{"role": "assistant", "content": "5"}],
        },
    ),
    "plain": ("plain", {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}),
}


def read(tmp_path, rows, format="plain", options=None, **spec):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(DatasetSpec(format, str(file), **spec), options or PairOptions())


@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_same_pair(tmp_path, name):
    format, row = ROWS[name]
    (pair,), report = read(tmp_path, [row], format)
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "4", "5")
    assert pair.source == row.get("source", "")
    assert (report.read, report.kept, report.ties, report.dropped) == (1, 1, 0, {})


def test_every_format_is_tried():
    assert {format for format, _ in ROWS.values()} == set(FORMATS)


def test_prompt_is_all_but_the_last_turn(tmp_path):
    row = {
        "conversations": shares("a", "b", "c", system="Be brief."),
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    (pair,), _ = read(tmp_path, [row], "sharegpt")
    assert [(m.role, m.content) for m in pair.prompt] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_system_message_rule(tmp_path):
    """The handbook's: an empty one where there is none. A data set's own stays; the rule can be off."""
    rows = [{"system": text, "question": "q", "chosen": "4", "rejected": "5"} for text in ("", "Be brief.")]
    pairs, _ = read(tmp_path, rows, "orca_dpo_pairs")
    assert [pair.prompt[0].content for pair in pairs] == ["", "Be brief."]
    pairs, _ = read(tmp_path, rows, "orca_dpo_pairs", PairOptions(insert_system=False))
    assert [pair.prompt[0].role for pair in pairs] == ["user", "system"]


GOOD = {"prompt": "q", "chosen": "4", "rejected": "5"}
BAD = {
    "no field rejected": {"prompt": "q", "chosen": "4"},
    "empty response": {**GOOD, "rejected": "  "},
    "empty prompt": {**GOOD, "prompt": ""},
    "chosen and rejected are the same": {**GOOD, "rejected": " 4 "},
    "mixed roles": {**GOOD, "prompt": turns("a", "b")},
    "unknown role": {**GOOD, "prompt": [{"role": "tool", "content": "x"}]},
    "not messages": {**GOOD, "prompt": 7},
    "message without text": {**GOOD, "prompt": [{"role": "user", "content": None}]},
    "chosen and rejected answer different prompts": {
        "prompt": "q",
        "chosen": turns("a", "4"),
        "rejected": turns("b", "5"),
    },
}


def test_rows_that_are_no_pairs_are_counted_with_their_place(tmp_path):
    pairs, report = read(tmp_path, [GOOD, *BAD.values(), GOOD])
    assert len(pairs) == report.kept == 2
    assert report.dropped == dict.fromkeys(BAD, 1)
    for line, reason in enumerate(BAD, 2):
        assert report.examples[reason][0].startswith(f"{tmp_path}/rows.jsonl:{line}")
        assert reason in report.describe()


def test_strict_mode_stops_and_lists_everything(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, [GOOD, *BAD.values()], options=PairOptions(strict=True))
    assert all(reason in str(error.value) for reason in BAD)
    assert f"{len(BAD)} problems" in str(error.value)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no usable pair"):
        read(tmp_path, [BAD["empty response"]])


def test_ties_are_counted_and_can_be_left_out(tmp_path):
    tied = {**ROWS["ultrafeedback, allenai"][1], "score_rejected": 8.0}
    rows = [tied, ROWS["ultrafeedback, allenai"][1]]
    pairs, report = read(tmp_path, rows, "ultrafeedback_allenai")
    assert (len(pairs), report.ties) == (2, 1)
    strict = PairOptions(drop_ties=True, strict=True)  # a choice, not a fault: strict mode does not mind
    pairs, report = read(tmp_path, rows, "ultrafeedback_allenai", strict)
    assert (len(pairs), report.ties, report.dropped) == (1, 0, {"tie": 1})


def test_sources_and_prompts_can_be_excluded(tmp_path):
    rows = [{**GOOD, "prompt": f"Question {i}?", "source": ("truthful_qa", "other")[i % 2]} for i in range(6)]
    names = tmp_path / "benchmark.jsonl"
    names.write_text('{"question": "question  3"}\n\n{"prompt": "unseen"}\n')
    options = PairOptions(exclude_sources=("truthful_qa",), exclude_prompts=read_prompts([names]))
    pairs, report = read(tmp_path, rows, options=options)
    assert [pair.prompt[1].content for pair in pairs] == ["Question 1?", "Question 5?"]
    assert report.dropped == {"excluded source": 3, "excluded prompt": 1}
    names.write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="benchmark.jsonl:1: no JSON object with prompt or question"):
        read_prompts([names])
    assert normalized("What's  UP?") == normalized("what s up")


def test_subsampling_is_a_seeded_choice_in_the_rows_order(tmp_path):
    rows = [{**GOOD, "prompt": str(i)} for i in range(100)]
    picks = []
    for seed in (1, 1, 2):
        pairs, report = read(tmp_path, rows, options=PairOptions(seed=seed), samples=20)
        assert (len(pairs), report.kept, report.unused) == (20, 20, 80)
        picks.append([int(pair.prompt[1].content) for pair in pairs])
        assert picks[-1] == sorted(picks[-1])
    assert picks[0] == picks[1] != picks[2]
    assert len(read(tmp_path, rows, samples=1000)[0]) == 100
