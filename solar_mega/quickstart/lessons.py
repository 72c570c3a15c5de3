"""The paper's training sets (Table 1) in small and self-made, in the fields of the real ones, so that every
stage of the recipe runs on any machine without a download:

    alpaca_gpt4.json       instruction, input, output           tasks on words
    openorca.jsonl         id, system_prompt, question, response  tasks on numbers, with a system message
    math.jsonl             problem, level, type, solution        seeds for Synth. Math-Instruct
    math_replay.jsonl      prompt, text                          what a model says to `synthesize` about them
    ultrafeedback.jsonl    prompt, chosen, rejected, scores       right answers before wrong and idle ones
    orca_dpo.jsonl         system, question, chosen, rejected

What a model of half a million weights learns from them is to answer in form; scores say no more than that.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solar_mega.data import math_prompts
from solar_mega.runtime.files import atomic_file

_SEED = 20231224
_WORDS = ("apple", "bread", "cloud", "green", "house", "light", "music", "ocean", "paper", "river", "seven")
_LETTERS = "abcdefgh"
_SYSTEM = (
    "You are a helpful assistant who answers briefly.",
    "Answer with the number only, then a full stop.",
    "",
)
_IDLE = ("I do not know.", "That is a good question.", "It depends on many things.", "Let us talk of music.")


def write_lessons(folder: Path) -> list[str]:
    """Writes the files; the same every time. Returns a line per file."""
    lines = []
    for name, (make, count) in _FILES.items():
        draw = random.Random(f"{_SEED} {name}")
        rows = [make(draw, number) for number in range(count)]
        with atomic_file(folder / name) as stream:
            if name.endswith(".json"):
                json.dump(rows, stream, indent=0)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
        lines.append(f"{folder / name}: {count} rows")
    seeds = [json.loads(line) for line in (folder / "math.jsonl").read_text("utf-8").splitlines()]
    recorded = [answer for number, seed in enumerate(seeds) for answer in _recorded(seed, number)]
    with atomic_file(folder / "math_replay.jsonl") as stream:
        stream.writelines(json.dumps(answer) + "\n" for answer in recorded)
    lines.append(f"{folder / 'math_replay.jsonl'}: {len(recorded)} rows")
    return lines


def _recorded(seed: dict[str, Any], number: int) -> list[dict[str, str]]:
    """The problem in other words, and that solved; every eighth answer is wrong, to be found out."""
    a, b = (int(word) for word in re.findall(r"\d+", seed["problem"]))
    if seed["problem"].startswith("What is"):
        question = f"Two numbers, {a} and {b}, are put together. Find their sum."
    else:
        question = f"When {a} is taken from a number, {b} is left. Find the number."
    answer = a + b + (number % 8 == 7)
    text = (
        f"We need {a} and {b} together. Counting on from {a} by {b} gives {answer}.\n\n$\\boxed{{{answer}}}$"
    )
    return [
        {"prompt": math_prompts.rephrase(seed["problem"]), "text": question},
        {"prompt": math_prompts.solve(question), "text": text},
    ]


def _word_task(draw: random.Random) -> tuple[str, str, str, str]:
    """(instruction, input, right answer, wrong answer)."""
    words = draw.sample(_WORDS, 3)
    given = " ".join(words)
    tasks = (
        ("Give only the first word.", given, words[0], words[2]),
        ("Give only the last word.", given, words[2], words[0]),
        ("Write these words in the opposite order.", given, " ".join(words[::-1]), given),
        (
            "Put these words into alphabetical order.",
            given,
            " ".join(sorted(words)),
            " ".join(sorted(words)[::-1]),
        ),
        (f"Repeat the word {words[0]} three times.", "", " ".join(words[:1] * 3), words[0]),
        (f"Is {words[0]} longer than {words[1]}?", "", *_yes_or_no(len(words[0]) > len(words[1]))),
    )
    return draw.choice(tasks)


def _yes_or_no(yes: bool) -> tuple[str, str]:
    return ("Yes.", "No.") if yes else ("No.", "Yes.")


def _number_task(draw: random.Random) -> tuple[str, str, str]:
    """(question, right answer, wrong answer)."""
    a, b = draw.sample(range(2, 30), 2)
    tasks = (
        (f"Which number is larger, {a} or {b}?", f"{max(a, b)}.", f"{min(a, b)}."),
        (f"Which number comes after {a}?", f"{a + 1}.", f"{a - 1}."),
        (f"Is {a} an even number?", *_yes_or_no(a % 2 == 0)),
        (f"Count from {a} to {a + 3}.", f"{a}, {a + 1}, {a + 2}, {a + 3}.", f"{a + 3}."),
    )
    return draw.choice(tasks)


def _alpaca(draw: random.Random, number: int) -> dict[str, Any]:
    instruction, given, right, _ = _word_task(draw)
    return {"instruction": instruction, "input": given, "output": right}


def _openorca(draw: random.Random, number: int) -> dict[str, Any]:
    question, right, _ = _number_task(draw)
    submix = draw.choice(("cot", "flan", "niv", "t0"))
    return {
        "id": f"{submix}.{number}",
        "system_prompt": draw.choice(_SYSTEM),
        "question": question,
        "response": right,
    }


def _math(draw: random.Random, number: int) -> dict[str, Any]:
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    if draw.random() < 0.5:
        problem, steps, answer = f"What is {a} + {b}?", f"Adding, {a} + {b} = {a + b}.", a + b
    else:
        letter = draw.choice(_LETTERS)
        problem = f"Solve {letter} - {a} = {b} for {letter}."
        steps, answer = f"Adding {a} to both sides, {letter} = {b} + {a} = {a + b}.", a + b
    solution = f"{steps} The answer is $\\boxed{{{answer}}}$."
    return {"problem": problem, "level": "Level 1", "type": "Algebra", "solution": solution}


def _pair(draw: random.Random) -> tuple[str, str, str]:
    """(question, chosen, rejected): a wrong answer or an idle one is rejected."""
    if draw.random() < 0.5:
        question, right, wrong = _number_task(draw)
    else:
        instruction, given, right, wrong = _word_task(draw)
        question = f"{instruction}\n\n{given}" if given else instruction
    return question, right, wrong if draw.random() < 0.5 else draw.choice(_IDLE)


def _ultrafeedback(draw: random.Random, number: int) -> dict[str, Any]:
    prompt, chosen, rejected = _pair(draw)
    asked = {"content": prompt, "role": "user"}
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "chosen": [asked, {"content": chosen, "role": "assistant"}],
        "rejected": [asked, {"content": rejected, "role": "assistant"}],
        "messages": [asked, {"content": chosen, "role": "assistant"}],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
        "source": draw.choice(("evol_instruct", "sharegpt", "flan_v2_niv2")),
    }


def _orca_dpo(draw: random.Random, number: int) -> dict[str, Any]:
    question, chosen, rejected = _pair(draw)
    return {"system": draw.choice(_SYSTEM), "question": question, "chosen": chosen, "rejected": rejected}


_FILES: dict[str, tuple[Callable[[random.Random, int], dict[str, Any]], int]] = {
    "alpaca_gpt4.json": (_alpaca, 400),
    "openorca.jsonl": (_openorca, 400),
    "math.jsonl": (_math, 120),
    "ultrafeedback.jsonl": (_ultrafeedback, 240),
    "orca_dpo.jsonl": (_orca_dpo, 120),
}
