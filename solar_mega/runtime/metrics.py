"""`metrics.jsonl`: one JSON object per line, appended and flushed as it happens, and still one history after
a crash and a resume."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from solar_mega.errors import UserError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any) -> Any:
    """Strict JSON has no nan and inf: they are written as strings, and read back as numbers."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


class MetricsWriter:
    """Appends to a metrics file; the caller makes one on rank 0 only.

    A line is written with a single call, so that a killed process leaves at most one torn line, at the end;
    that line is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._cut(_end_of_whole_lines(self.path))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record. Tensors and arrays of one element become numbers."""
        text = json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False)
        self.file.write(text.encode() + b"\n")

    def truncate_after(self, step: int) -> int:
        """Cuts the file before the first record whose `step` is above `step`, for a run that resumes there: a
        step that is run again does not appear twice. Returns how many records were cut."""
        keep, cut = None, 0
        for start, record in _records(self.path):
            if keep is None and isinstance(record.get("step"), int) and record["step"] > step:
                keep = start
            cut += keep is not None
        if keep is not None:
            self._cut(keep)
        return cut

    def _cut(self, size: int) -> None:
        if size < os.fstat(self.file.fileno()).st_size:
            self.file.truncate(size)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records, in order. A torn last line (the run may be writing it) is left out.
    Raises UserError when the file is missing or another line is not a JSON object."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such metrics file")
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset of the line, record) for each whole line."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: not a JSON object: {line[:60]!r}")
            yield offset, _from_json(record)
            offset += len(line)


def _end_of_whole_lines(path: Path) -> int:
    """Size of the file without a torn last line. Reads backwards: the file may be long."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
