"""Small self-made task files in the fields of the six data sets of H6, for trying the pipeline without any
download. Questions are arithmetic and everyday facts from templates; scores on them say nothing about a
model beyond that the path works.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solar_mega.runtime.files import atomic_file

Record = dict[str, Any]
_SEED = 20231223

_THINGS = ("apples", "books", "coins", "cups", "eggs", "keys", "pens", "stones", "tickets", "windows")
_NAMES = ("Anna", "Ben", "Clara", "David", "Eva", "Frank", "Grace", "Hugo", "Ida", "Jonas")
_OPPOSITES = (
    ("big", "small", "box", "ball"),
    ("heavy", "light", "bag", "stone"),
    ("long", "short", "table", "board"),
    ("wide", "narrow", "door", "sofa"),
    ("full", "empty", "bucket", "bottle"),
)
_ROUTINES = (
    ("Making tea", "A woman fills a kettle with water and sets it on the stove.", "pours the hot water"),
    ("Cutting grass", "A man pushes a machine over the lawn in straight lines.", "empties the bag of grass"),
    ("Painting a wall", "A girl dips a brush into a can of white paint.", "draws the brush along the wall"),
    ("Baking bread", "A baker kneads the dough on a board with flour.", "puts the loaf into the oven"),
    ("Washing a car", "A boy sprays a dusty car with water from a hose.", "wipes the doors with a sponge"),
)
_OTHER_ENDINGS = (
    "sings to the moon about numbers.",
    "turns into a blue triangle.",
    "reads the ocean upside down.",
    "sells the sky to a chair.",
)


def write_tiny_tasks(folder: Path) -> list[str]:
    """Writes the files below `folder`; the same every time. Returns a line per file."""
    lines = []
    for place, (make, count) in _FILES.items():
        draw = random.Random(f"{_SEED} {place}")
        with atomic_file(folder / f"{place}.jsonl") as stream:
            for number in range(count):
                stream.write(json.dumps(make(draw, number)) + "\n")
        lines.append(f"{folder / place}.jsonl: {count} records")
    return lines


def _arc(draw: random.Random, number: int) -> Record:
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    thing, name = draw.choice(_THINGS), draw.choice(_NAMES)
    texts, right = _choices(draw, [a + b, a + b + 1, abs(a - b), a + b + 10])
    return {
        "id": f"self-made-{number}",
        "question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[right],
    }


def _hellaswag(draw: random.Random, number: int) -> Record:
    label, context, ending = draw.choice(_ROUTINES)
    endings = [f"{ending}.", *draw.sample(_OTHER_ENDINGS, 3)]
    draw.shuffle(endings)
    who = draw.choice(("then", "next", "at last"))
    return {
        "ind": number,
        "activity_label": label,
        "ctx_a": context,
        "ctx_b": f"{who} the person",
        "ctx": f"{context} {who} the person",
        "endings": endings,
        "source_id": f"self-made~{number}",
        "split": "val",
        "split_type": "indomain",
        "label": str(endings.index(f"{ending}.")),
    }


def _mathematics(draw: random.Random, number: int) -> Record:
    a, b = draw.randint(2, 12), draw.randint(2, 12)
    texts, right = _choices(draw, [a * b, a * b + a, a + b, a * b + 1])
    return {
        "question": f"What is {a} times {b}?",
        "subject": "elementary_mathematics",
        "choices": texts,
        "answer": right,
    }


def _computing(draw: random.Random, number: int) -> Record:
    bits = draw.randint(2, 12)
    texts, right = _choices(draw, [2**bits, 2**bits - 1, 2 * bits, 2 ** (bits - 1)])
    return {
        "question": f"How many different values can {bits} bits hold?",
        "subject": "high_school_computer_science",
        "choices": texts,
        "answer": right,
    }


def _logic(draw: random.Random, number: int) -> Record:
    p, q = draw.sample(("it rains", "the lamp is on", "the door is shut", "the train is late"), 2)
    texts, right = _choices(draw, [q, f"not {q}", f"not {p}", "nothing follows"])
    return {
        "question": f"If {p}, then {q}. In fact {p}. What follows?",
        "subject": "formal_logic",
        "choices": texts,
        "answer": right,
    }


def _truthfulqa(draw: random.Random, number: int) -> Record:
    a = draw.randint(3, 60)
    true = [f"{a} is {'an even' if a % 2 == 0 else 'an odd'} number.", f"{a + 1} comes after {a}."]
    false = [
        f"{a} is {'an odd' if a % 2 == 0 else 'an even'} number.",
        f"{a} comes after {a + 1}.",
        f"{a} is larger than {a + 5}.",
    ]
    return {
        "question": f"What is true of the number {a}?",
        "mc1_targets": {"choices": [true[0], *false], "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": [*true, *false], "labels": [1, 1, 0, 0, 0]},
    }


def _winogrande(draw: random.Random, number: int) -> Record:
    adjective, opposite, one, other = draw.choice(_OPPOSITES)
    asked, answer = draw.choice(((adjective, "2"), (opposite, "1")))
    return {
        "sentence": f"The {one} does not fit into the place of the {other} because the _ is too {asked}.",
        "option1": one,
        "option2": other,
        "answer": answer,
    }


def _gsm8k(draw: random.Random, number: int) -> Record:
    a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 9)
    thing, name = draw.choice(_THINGS), draw.choice(_NAMES)
    return {
        "question": f"{name} buys {a} bags with {b} {thing} each and loses {c} of the {thing}. "
        f"How many {thing} are left?",
        "answer": f"The bags hold {a} * {b} = <<{a}*{b}={a * b}>>{a * b} {thing}.\n"
        f"Then {a * b} - {c} = <<{a * b}-{c}={a * b - c}>>{a * b - c} are left.\n#### {a * b - c}",
    }


def _choices(draw: random.Random, values: list) -> tuple[list[str], int]:
    """(texts in random order, place of the first value); equal ones are told apart."""
    texts: list[str] = []
    for value in values:
        text = str(value)
        while text in texts:
            text = str(int(text) + 3) if text.lstrip("-").isdigit() else text + " indeed"
        texts.append(text)
    right = texts[0]
    draw.shuffle(texts)
    return texts, texts.index(right)


_FILES: dict[str, tuple[Callable[[random.Random, int], Record], int]] = {
    "arc_challenge/train": (_arc, 30),
    "arc_challenge/test": (_arc, 40),
    "hellaswag/train": (_hellaswag, 15),
    "hellaswag/validation": (_hellaswag, 40),
    "mmlu/elementary_mathematics/dev": (_mathematics, 5),
    "mmlu/elementary_mathematics/test": (_mathematics, 20),
    "mmlu/high_school_computer_science/dev": (_computing, 5),
    "mmlu/high_school_computer_science/test": (_computing, 10),
    "mmlu/formal_logic/dev": (_logic, 5),
    "mmlu/formal_logic/test": (_logic, 10),
    "truthfulqa/validation": (_truthfulqa, 30),
    "winogrande/train": (_winogrande, 10),
    "winogrande/validation": (_winogrande, 30),
    "gsm8k/train": (_gsm8k, 12),
    "gsm8k/test": (_gsm8k, 16),
}
