"""`solar-mega decontaminate`: training data without what the benchmarks ask (paper, 4.1 and Table 8).

    1. FLAN tasks        rows whose text is that of a row of a FLAN task on the list (OpenOrca's own ids name
                         only the submix, so the task is found by joining on the text)
    2. n-grams           rows that share 13 words in a row with a benchmark text (`overlap.py`)
    3. near duplicates   rows with a text whose word pairs are 80% those of a benchmark text (MinHash)

Rows are judged by worker processes in chunks, in order, with a bounded number of chunks in memory. Kept rows
are written byte for byte (JSON lines) or value for value (JSON arrays, parquet); originals are not touched.
"""

import collections
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.data.judge import Benchmarks, Judge, Verdict, read_benchmarks, read_flan
from solar_mega.data.sources import Source, find_sources
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import Progress, say, table
from solar_mega.runtime.cores import available_cores
from solar_mega.runtime.files import atomic_directory

FLAN_TASKS = (
    "task228_arc_answer_generation_easy",
    "ai2_arc/ARC-Challenge:1.0.0",
    "ai2_arc/ARC-Easy:1.0.0",
    "task229_arc_answer_generation_hard",
    "hellaswag:1.1.0",
    "task1389_hellaswag_completion",
    "cot_gsm8k",
    "cot_gsm8k_ii",
    "drop:2.0.0",
    "winogrande:1.1.0",
)
"""The paper's filter list (Table 8)."""

_CHUNK_ROWS = 512
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class DecontaminateOptions:
    """Remove from training data what overlaps with benchmarks. Writes the kept rows under their files' names,
    report.json and removed.jsonl (every removed row's place and reason) to a new directory."""

    inputs: Positional[tuple[str, ...]] = ()
    """Training data: .jsonl, .json or .parquet files, directories or globs."""

    output: Path | None = None
    """New or empty directory."""

    config: Path | None = None
    """TOML file with any of these settings; the command line wins."""

    against: tuple[Path, ...] = ()
    """Benchmark files, or directories: there all files named test*, val* or validation*, or every file when
    none is."""

    ngram: int = 13
    """Words in a row that may not be shared; 0 does not look."""

    near: float = 0.8
    """Similarity (Jaccard) from which a text is a near duplicate of a benchmark's; 0 does not look."""

    flan: tuple[Path, ...] = ()
    """Files of the FLAN collection (fields inputs and task_name) to find rows' tasks in."""

    flan_tasks: tuple[str, ...] = FLAN_TASKS
    """Tasks whose rows are removed; default: the paper's list."""

    workers: int | None = None
    """Processes; default: the cores this process may use. The result does not depend on it."""

    dry_run: bool = False
    """Check and report, write nothing."""


def decontaminate(argv: Sequence[str]) -> int:
    options = parse_options(DecontaminateOptions, argv, "decontaminate")
    sources = _check(options)
    report = run(options, sources)
    say(describe(report))
    return 0


def run(o: DecontaminateOptions, sources: Sequence[Source]) -> dict[str, Any]:
    """Judges every row and writes what is kept. Returns the report. Raises UserError."""
    benchmarks = read_benchmarks(o.against, o.ngram)
    flan = read_flan(o.flan, frozenset(o.flan_tasks))
    workers = o.workers or available_cores()
    with tempfile.TemporaryDirectory() as folder:
        benchmarks.index.save(Path(folder))
        judge = Judge(Path(folder), benchmarks.shingled(o.near), flan, frozenset(o.flan_tasks), o.near)
        if o.dry_run:
            return _judge_all(o, sources, judge, benchmarks, workers, None)
        assert o.output is not None
        with atomic_directory(o.output) as target:
            report = _judge_all(o, sources, judge, benchmarks, workers, target)
            (target / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return report


def _judge_all(
    o: DecontaminateOptions,
    sources: Sequence[Source],
    judge: Judge,
    benchmarks: Benchmarks,
    workers: int,
    target: Path | None,
) -> dict[str, Any]:
    files, reasons = {}, collections.Counter()
    removed_path = os.devnull if target is None else target / "removed.jsonl"
    spawn = multiprocessing.get_context("spawn")
    with (
        open(removed_path, "w", encoding="utf-8") as removed,
        ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(judge,)) as pool,
        Progress(sum(source.nbytes for source in sources), "bytes", "decontaminate") as progress,
    ):
        for source in sources:
            counts = collections.Counter()
            writer = None if target is None else _Writer(source, target / source.path.name)
            for chunk, verdicts in _judged(pool, source, workers):
                keep = [verdict is None for verdict in verdicts]
                if writer is not None:
                    writer.write(chunk, keep)
                for place, verdict in enumerate(verdicts, chunk.first):
                    counts["rows"] += 1
                    if verdict is not None:
                        counts[verdict.reason] += 1
                        entry = _entry(source, place, verdict, benchmarks)
                        removed.write(json.dumps(entry, ensure_ascii=False) + "\n")
                progress.advance(chunk.nbytes)
            if writer is not None:
                writer.close()
            files[str(source.path)] = dict(counts)
            reasons.update(counts)
    rows = reasons.pop("rows", 0)
    return {
        "rows": rows,
        "kept": rows - sum(reasons.values()),
        "removed": dict(reasons),
        "files": files,
        "benchmarks": benchmarks.facts(),
        "settings": {"ngram": o.ngram, "near": o.near, "flan_tasks": list(o.flan_tasks) if o.flan else []},
    }


def _entry(source: Source, place: int, verdict: Verdict, benchmarks: Benchmarks) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": str(source.path), "row": place, "reason": verdict.reason}
    if verdict.owner is not None:
        entry["benchmark"] = benchmarks.places[verdict.owner]
    return entry | {"evidence": verdict.evidence}


# ------------------------------------------------------------------------------------------------ chunks


@dataclass
class Chunk:
    """Consecutive rows of a file, as read."""

    rows: list[Any]
    """Lines (bytes), or values of a JSON array or parquet file."""
    first: int
    nbytes: int
    """Its share of the file."""
    batch: Any = None
    """The pyarrow table that parquet rows came from; stays in this process."""


def chunks_of(source: Source) -> Iterator[Chunk]:
    """Raises UserError when the file cannot be read."""
    try:
        if source.format == "parquet":
            yield from _parquet_chunks(source)
        elif _is_array(source.path):
            values = json.loads(source.path.read_text("utf-8-sig"))
            step = max(1, len(values))
            for first in range(0, len(values), _CHUNK_ROWS):
                rows = values[first : first + _CHUNK_ROWS]
                yield Chunk(rows, first, source.nbytes * len(rows) // step)
        else:
            yield from _line_chunks(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path} cannot be read: {error}") from error


def _is_array(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_chunks(source: Source) -> Iterator[Chunk]:
    rows: list[bytes] = []
    size, first = 0, 0
    with open(source.path, "rb") as stream:
        for line in stream:
            rows.append(line)
            size += len(line)
            if len(rows) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield Chunk(rows, first, size)
                first += len(rows)
                rows, size = [], 0
    if rows:
        yield Chunk(rows, first, size)


def _parquet_chunks(source: Source) -> Iterator[Chunk]:
    import pyarrow.parquet

    first = 0
    with pyarrow.parquet.ParquetFile(source.path) as file:
        total = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(_CHUNK_ROWS):
            yield Chunk(batch.to_pylist(), first, source.nbytes * batch.num_rows // total, batch)
            first += batch.num_rows


def _judged(
    pool: ProcessPoolExecutor, source: Source, workers: int
) -> Iterator[tuple[Chunk, list[Verdict | None]]]:
    """Chunks in order with their rows' verdicts; at most three per worker in memory."""
    waiting: collections.deque = collections.deque()
    for chunk in chunks_of(source):
        waiting.append((chunk, pool.submit(_judge_rows, chunk.rows)))
        if len(waiting) >= 3 * workers:
            done, future = waiting.popleft()
            yield done, future.result()
    while waiting:
        done, future = waiting.popleft()
        yield done, future.result()


_judge: Judge | None = None  # of this worker process


def _start_worker(judge: Judge) -> None:
    global _judge
    _judge = judge.open()


def _judge_rows(rows: list[Any]) -> list[Verdict | None]:
    assert _judge is not None
    return [_judge.row(row) for row in rows]


class _Writer:
    """Kept rows in the form of the input file."""

    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        self.array = source.format != "parquet" and _is_array(source.path)
        self.values: list[Any] = []
        self.parquet: Any = None
        if source.format == "parquet":
            import pyarrow.parquet

            schema = pyarrow.parquet.read_schema(source.path)
            self.parquet = pyarrow.parquet.ParquetWriter(path, schema)
        elif not self.array:
            self.lines = open(path, "wb")  # noqa: SIM115  closed in close()

    def write(self, chunk: Chunk, keep: list[bool]) -> None:
        if self.parquet is not None:
            import pyarrow

            self.parquet.write_batch(chunk.batch.filter(pyarrow.array(keep)))
            return
        kept = [row for row, stays in zip(chunk.rows, keep, strict=True) if stays]
        if self.array:
            self.values += kept
        else:
            self.lines.writelines(kept)

    def close(self) -> None:
        if self.parquet is not None:
            self.parquet.close()
        elif self.array:
            text = json.dumps(self.values, ensure_ascii=False, indent=1)
            self.path.write_text(text + "\n", "utf-8")
        else:
            self.lines.close()


# ------------------------------------------------------------------------------------------------ words


def _check(o: DecontaminateOptions) -> list[Source]:
    problems = Problems()
    if not o.inputs:
        problems.add("no training data given; name .jsonl, .json or .parquet files")
    if o.output is None and not o.dry_run:
        problems.add("--output is missing: a new directory for the kept rows")
    if not o.against and not o.flan:
        problems.add("nothing to compare with: give --against (benchmark files), --flan, or both")
    if o.ngram < 0 or o.ngram == 1:
        problems.add(f"--ngram {o.ngram}: must be 0 (off) or 2 and more")
    if not 0 <= o.near <= 1:
        problems.add(f"--near {o.near}: must be 0 (off) to 1")
    if o.workers is not None and o.workers < 1:
        problems.add(f"--workers {o.workers}: must be 1 or more")
    problems.raise_if_any("decontaminate")
    sources = find_sources(o.inputs)
    for source in sources:
        if source.format == "txt" or source.compression:
            problems.add(f"{source.path}: give .jsonl, .json or .parquet, not compressed")
    names = collections.Counter(source.path.name for source in sources)
    for name, count in names.items():
        if count > 1:
            problems.add(f"{count} inputs are called {name}, and outputs keep the names; run them one by one")
    problems.raise_if_any("decontaminate")
    return sources


def describe(report: dict[str, Any]) -> str:
    """The report as a table for the console."""
    reasons = list(report["removed"])
    rows = [
        (Path(path).name, counts.get("rows", 0), *(counts.get(reason, 0) for reason in reasons))
        for path, counts in report["files"].items()
    ]
    text = table(rows, ("file", "rows", *reasons))
    facts = report["benchmarks"]
    return (
        f"{text}\n{report['kept']} of {report['rows']} rows kept; compared with {facts['records']} benchmark "
        f"records ({facts['ngrams']} n-grams; {facts['too_short']} texts under {facts['shortest']} words "
        "cannot be looked for)"
    )
