"""Rows of instruction and preference data, from any place people keep them: json, jsonl, parquet, a dataset
directory of the `datasets` library, a directory of such files, or a name on the Hugging Face Hub.

What is unusable (bad JSON, not UTF-8, not an object) comes out as a BadRecord in its place, so that the
reader can count it and say where it is.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from solar_mega.data.sources import (
    BOM,
    UNPACKING_ERRORS,
    BadRecord,
    Source,
    find_sources,
    open_source,
    parquet_rows,
)
from solar_mega.errors import Problems, UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Row:
    """One record and where it stood, counted from 0."""

    values: dict[str, Any]
    path: Path
    place: int
    unit: Literal["line", "row"]

    def where(self) -> str:
        """`file:line`, lines counted from 1 as editors do, or `file: row N`."""
        return f"{self.path}:{self.place + 1}" if self.unit == "line" else f"{self.path}: row {self.place}"


@dataclass(frozen=True)
class DatasetSpec:
    """A data set as configurations spell it: `FORMAT PATH [samples=N] [rows=A:B] [split=NAME]`.

    Paths with spaces are quoted as in a shell.
    """

    format: str
    path: str
    samples: int | None = None
    """Rows drawn at random (with the run's seed) from those kept; all when there are no more."""
    rows: tuple[int, int | None] = (0, None)
    """Only rows A up to, not including, B of the source, counted from 0."""
    split: str | None = None
    """Split of a dataset directory or Hub data set; in a directory of files, the beginning of their names."""

    @property
    def name(self) -> str:
        """Short, for reports."""
        return f"{self.format} {Path(self.path).name}"


def parse_spec(text: str, key: str, formats: Sequence[str]) -> DatasetSpec:
    """Raises UserError naming `key`, with what is allowed."""
    usage = f'write "FORMAT PATH [samples=N] [rows=A:B] [split=NAME]", FORMAT one of {", ".join(formats)}'
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key}: {text!r}: {error}; {usage}") from None
    if len(words) < 2 or words[0] not in formats:
        raise UserError(f"{key}: {text!r} is not a data set; {usage}")
    options: dict[str, Any] = {}
    known = {field.name for field in fields(DatasetSpec)} - {"format", "path"}
    for word in words[2:]:
        name, equals, value = word.partition("=")
        if name not in known or not equals or name in options:
            raise UserError(f"{key}: {text!r}: cannot read {word!r}; {usage}")
        options[name] = _option(name, value, f"{key}: {text!r}")
    return DatasetSpec(words[0], words[1], **options)


def parse_specs(
    texts: Sequence[str], key: str, formats: Sequence[str], problems: Problems
) -> list[DatasetSpec]:
    """As `parse_spec` for several; what cannot be read joins `problems`."""
    specs = []
    for text in texts:
        try:
            specs.append(parse_spec(text, key, formats))
        except UserError as error:
            problems.add(str(error))
    return specs


def _option(name: str, value: str, place: str) -> Any:
    if name == "samples" and value.isdigit() and int(value) > 0:
        return int(value)
    if name == "rows" and (match := re.fullmatch(r"(\d*):(\d*)", value)):
        start, end = int(match[1] or 0), int(match[2]) if match[2] else None
        if end is None or start < end:
            return start, end
    if name == "split" and value:
        return value
    allowed = {"samples": "a number above 0", "rows": "A:B with A < B, counted from 0", "split": "a name"}
    raise UserError(f"{place}: {name}={value} must be {allowed[name]}")


def read_rows(spec: DatasetSpec) -> Iterator[Row | BadRecord]:
    """The rows of a data set in their order. Raises UserError when there is nothing to read."""
    first, end = spec.rows
    for number, row in enumerate(_all_rows(spec)):
        if end is not None and number >= end:
            return
        if number >= first:
            yield row


def _all_rows(spec: DatasetSpec) -> Iterator[Row | BadRecord]:
    path = Path(spec.path).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_datasets(spec, path)
    if not path.exists() and _HUB_NAME.fullmatch(spec.path):
        return _from_hub(spec)
    sources = [source for source in find_sources([str(path)]) if source.format != "txt"]
    if path.is_dir() and spec.split is not None:
        sources = [source for source in sources if source.path.name.startswith(spec.split)]
    if not sources:
        named = f" whose name begins with {spec.split!r}" if spec.split else ""
        raise UserError(f"{spec.path}: no .json, .jsonl or .parquet file{named} there")
    return (row for source in sources for row in _from_file(source))


def _from_file(source: Source) -> Iterator[Row | BadRecord]:
    if source.format == "parquet":
        return _from_parquet(source)
    try:
        with open_source(source) as stream:
            head = stream.read(4096).removeprefix(BOM).lstrip()
    except UNPACKING_ERRORS as error:
        raise UserError(f"{source.path}: cannot be read: {error}") from None
    if head.startswith(b"["):
        return _from_array(source)
    if source.path.suffix == ".json" and (record := _whole_object(source)) is not None:
        return iter([_checked(record, source.path, 0, "row")])
    return _from_lines(source)


def _whole_object(source: Source) -> Any | None:
    """The file as one JSON value, as MATH has a file per problem; None where it has several."""
    with open_source(source) as stream:
        try:
            return json.loads(stream.read().removeprefix(BOM).decode("utf-8"))
        except (ValueError, RecursionError):
            return None


def _from_array(source: Source) -> Iterator[Row | BadRecord]:
    with open_source(source) as stream:
        content = stream.read()
    try:
        records = json.loads(content.removeprefix(BOM).decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise UserError(f"{source.path}: not a JSON array in UTF-8: {error}") from None
    for place, record in enumerate(records):
        yield _checked(record, source.path, place, "row")


def _from_lines(source: Source) -> Iterator[Row | BadRecord]:
    with open_source(source) as stream:
        for place, line in enumerate(stream):
            text = line.removeprefix(BOM) if place == 0 else line
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield BadRecord(source.path, place, "line", f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                yield BadRecord(source.path, place, "line", f"not JSON: {error}")
            else:
                yield _checked(record, source.path, place, "line")


def _checked(record: Any, path: Path, place: int, unit: Literal["line", "row"]) -> Row | BadRecord:
    if isinstance(record, dict):
        return Row(record, path, place, unit)
    return BadRecord(path, place, unit, f"not an object with fields but {type(record).__name__}")


def _from_parquet(source: Source) -> Iterator[Row | BadRecord]:
    import pyarrow

    try:
        for place, record in enumerate(parquet_rows(source.path)):
            yield Row(record, source.path, place, "row")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{source.path}: not a readable parquet file: {error}") from None


def _from_datasets(spec: DatasetSpec, path: Path) -> Iterator[Row | BadRecord]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{spec.path}: cannot be read as a dataset directory: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        split = spec.split or "train"
        if split not in data:
            raise UserError(
                f"{spec.path}: has no split {split!r}; write split=NAME, one of {', '.join(data)}"
            )
        data = data[split]
    return (Row(dict(record), path, place, "row") for place, record in enumerate(data))


def _from_hub(spec: DatasetSpec) -> Iterator[Row | BadRecord]:
    import datasets

    split = spec.split or "train"
    try:
        data = datasets.load_dataset(spec.path, split=split)
    except Exception as error:  # the library raises network, file and value errors of many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{spec.path}: no such file or directory, and as a Hugging Face data set (split {split}) it "
            f"cannot be loaded: {first}"
        ) from error
    return (Row(dict(record), Path(spec.path), place, "row") for place, record in enumerate(data))
