"""Task data from a directory of files, in the data sets' own fields.

    DATA/arc_challenge/test.jsonl                 and train.jsonl for the few-shot examples
    DATA/mmlu/virology/test.jsonl                 and dev.jsonl; one directory per subject

Files may be .jsonl, .json (one object per line) or .parquet. Every record is looked at before anything runs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.data.sources import parquet_rows
from solar_mega.errors import Problems, UserError
from solar_mega.evaluate.tasks import TaskPlan

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN = 5  # problems listed per file


@dataclass(frozen=True)
class Layout:
    """Where a task's files lie and what is in them."""

    folder: str
    test: tuple[str, ...]
    """Splits that can hold what is scored; the first one there is is used."""
    fewshot: str | None
    """Split that examples are drawn from."""
    fields: dict[str, Any]
    """Field -> type, or for nested fields a dict of them."""


_MC = {"choices": list, "labels": list}
LAYOUTS = {
    "arc_challenge": Layout(
        "arc_challenge",
        ("test",),
        "train",
        {"question": str, "choices": {"text": list, "label": list}, "answerKey": str},
    ),
    "hellaswag": Layout(
        "hellaswag",
        ("validation",),
        "train",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)},
    ),
    "mmlu": Layout("mmlu/SUBJECT", ("test",), "dev", {"question": str, "choices": list, "answer": int}),
    "truthfulqa_mc2": Layout(
        "truthfulqa", ("validation",), None, {"question": str, "mc1_targets": _MC, "mc2_targets": _MC}
    ),
    "winogrande": Layout(
        "winogrande",
        ("validation",),
        "train",
        {"sentence": str, "option1": str, "option2": str, "answer": (str, int)},
    ),
    "gsm8k": Layout("gsm8k", ("test",), "train", {"question": str, "answer": str}),
}
_SPLIT_KEYS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass(frozen=True)
class TaskFiles:
    """The files of one unit of a task."""

    unit: str
    splits: dict[str, Path]
    test_split: str

    def overrides(self, fewshot_split: str | None) -> dict[str, Any]:
        """Settings that make lm-evaluation-harness read these files."""
        kind = "parquet" if next(iter(self.splits.values())).suffix == ".parquet" else "json"
        files = {split: str(path.resolve()) for split, path in self.splits.items()}
        splits = {key: split if split in files else None for split, key in _SPLIT_KEYS.items()}
        return {
            "dataset_path": kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            **splits,
            "fewshot_split": fewshot_split if fewshot_split in files else None,
        }


def layout_of(name: str) -> Layout | None:
    return LAYOUTS.get("mmlu" if name.startswith("mmlu_") else name)


def which_files(plans: list[TaskPlan]) -> str:
    """What to put where, for an error message."""
    lines = []
    for plan in plans:
        layout = layout_of(plan.name)
        if layout is None:
            lines.append(f"  {plan.name}: not one of the six tasks of H6; only from the hub")
            continue
        need = f"{layout.test[0]}.jsonl"
        if layout.fewshot and plan.fewshot != 0:
            need += f", {layout.fewshot}.jsonl (few-shot examples)"
        lines.append(f"  DATA/{layout.folder}/: {need}; fields {', '.join(layout.fields)}")
    return "\n".join(lines)


def has_files(data: Path, plan: TaskPlan) -> bool:
    """Whether the directory has anything of this task to score."""
    layout = layout_of(plan.name)
    return layout is not None and any(_files_of(data, layout, unit) is not None for unit in plan.units)


def find_task_files(data: Path, plans: list[TaskPlan]) -> dict[str, TaskFiles]:
    """Files of every unit of `plans` by unit, all records checked.

    MMLU may have fewer subjects than 57, but at least one. Raises UserError listing every missing file and
    bad record.
    """
    if not data.is_dir():
        raise UserError(
            f"--data {data} is not a directory; it holds task files like this:\n{which_files(plans)}"
        )
    problems, found = Problems(), {}
    for plan in plans:
        layout = layout_of(plan.name)
        if layout is None:
            problems.add(f"{plan.name} has no files under {data}: only the six tasks of H6 can be local")
            continue
        units = {unit: _files_of(data, layout, unit) for unit in plan.units}
        units = {unit: files for unit, files in units.items() if files is not None}
        if not units:
            problems.add(f"{plan.title} is not under {data}:\n{which_files([plan])}")
        for unit, files in units.items():
            _check_files(files, layout, plan, problems)
            found[unit] = files
    problems.raise_if_any(f"task files under {data}")
    return found


def _files_of(data: Path, layout: Layout, unit: str) -> TaskFiles | None:
    folder = data / layout.folder.replace("SUBJECT", unit.removeprefix("mmlu_"))
    wanted = (*layout.test, layout.fewshot) if layout.fewshot else layout.test
    splits = {}
    for split in wanted:
        path = next((folder / f"{split}{s}" for s in _SUFFIXES if (folder / f"{split}{s}").is_file()), None)
        if path is not None:
            splits[split] = path
    test = next((split for split in layout.test if split in splits), None)
    return None if test is None else TaskFiles(unit, splits, test)


def _check_files(files: TaskFiles, layout: Layout, plan: TaskPlan, problems: Problems) -> None:
    if layout.fewshot and plan.fewshot and layout.fewshot not in files.splits:
        folder = files.splits[files.test_split].parent
        problems.add(f"{folder}/{layout.fewshot}.jsonl is missing: {plan.fewshot} examples come from there")
    if len({path.suffix == ".parquet" for path in files.splits.values()}) > 1:
        problems.add(f"{files.splits[files.test_split].parent}: mixes parquet and JSON; use one kind")
    for split, path in files.splits.items():
        count, bad = 0, 0
        for place, record in records(path):
            count += 1
            wrong = _problems_of(record, layout.fields) if isinstance(record, dict) else ["is no JSON object"]
            bad += bool(wrong)
            if wrong and bad <= _SHOWN:
                problems.add(f"{path}:{place}: {'; '.join(wrong)}")
        if bad > _SHOWN:
            problems.add(f"{path}: {bad - _SHOWN} more records like these")
        if count == 0:
            problems.add(f"{path} is empty")
        elif split == layout.fewshot and plan.fewshot and count < plan.fewshot:
            problems.add(f"{path} has {count} records; {plan.fewshot} examples are drawn from it")


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, record) of a .jsonl or .parquet file; a line that is no JSON gives its text.
    Raises UserError when the file cannot be read."""
    try:
        if path.suffix == ".parquet":
            yield from enumerate(parquet_rows(path), 1)
            return
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, line
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _problems_of(record: dict, fields: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, kind in fields.items():
        value = record.get(name)
        if name not in record:
            found.append(f"no field {prefix}{name} (it has {', '.join(list(record)[:8]) or 'none'})")
        elif isinstance(kind, dict):
            if isinstance(value, dict):
                found += _problems_of(value, kind, f"{prefix}{name}.")
            else:
                found.append(f"{prefix}{name} is {type(value).__name__}, not an object")
        elif not isinstance(value, kind) or (isinstance(value, list) and not value):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join({str: "text", int: "a number", list: "a list with entries"}[k] for k in kinds)
            found.append(f"{prefix}{name} is {type(value).__name__} {str(value)[:40]!r}, not {names}")
    return found
