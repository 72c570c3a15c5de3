"""Which files to read: paths, globs and directories, recognised by suffix and looked at before the work."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solar_mega.errors import Problems

Format = Literal["jsonl", "parquet", "txt"]
TxtDocument = Literal["file", "line"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
    ".text": "txt",
}
_COMPRESSIONS = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
UNPACKING_ERRORS = (EOFError, zlib.error, OSError)


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    format: Format
    compression: Literal["", ".gz", ".zst"]
    nbytes: int


@dataclass(frozen=True)
class ReadOptions:
    key: str = "text"
    """JSON key or parquet column that holds the document."""
    txt_document: TxtDocument = "file"
    """What one document is in text files."""


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable document. `place` counts bytes, lines or rows from 0, as `unit` says."""

    path: Path
    place: int
    unit: Literal["byte", "line", "row", "file"]
    reason: str

    def describe(self) -> str:
        """`file:line: reason`, lines counted from 1 as editors do."""
        if self.unit == "byte":
            return f"{self.path}:{_line_at(self.path, self.place)}: {self.reason}"
        if self.unit == "line":
            return f"{self.path}:{self.place + 1}: {self.reason}"
        if self.unit == "row":
            return f"{self.path}: row {self.place}: {self.reason}"
        return f"{self.path}: {self.reason}"


def find_sources(inputs: Sequence[str], format: Format | None = None) -> list[Source]:
    """Files named by paths, globs (`**` included) and directories (searched through), in the order given,
    sorted within each. `format` overrides what the suffixes say.

    Raises:
        UserError: everything that is missing, unrecognised or given twice.
    """
    problems, sources = Problems(), []
    if not inputs:
        problems.add("no files given; name files, directories or patterns")
    for given in inputs:
        found = _files_of(given, format, problems)
        sources += found
    seen: set[Path] = set()
    for source in sources:
        real = source.path.resolve()
        if real in seen:
            problems.add(
                f"{source.path} is given twice; to use a text more often, weight its corpus in data.train"
            )
        seen.add(real)
    problems.raise_if_any("input")
    return sources


def _files_of(given: str, format: Format | None, problems: Problems) -> list[Source]:
    path = Path(given)
    if path.is_dir():
        everything = sorted(
            child for child in path.rglob("*") if child.is_file() and not child.name.startswith(".")
        )
        sources = [source for child in everything if (source := _source(child, format))]
        if not sources:
            problems.add(
                f"{given}: no {', '.join(_FORMATS)} file (or .gz, .zst of one) in this directory; "
                f"--format reads other names"
            )
        return sources
    if path.is_file():
        matches = [path]
    else:
        matches = _glob(given)
        if not matches:
            problems.add(f"{given}: no such file, and nothing matches it as a pattern")
    sources = []
    for match in matches:
        source = _source(match, format)
        if source is None:
            problems.add(
                f"{match}: unknown kind of file; allowed are {', '.join(_FORMATS)}, or say --format "
                f"jsonl, parquet or txt"
            )
        else:
            sources.append(source)
    return sources


def _glob(pattern: str) -> list[Path]:
    return sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())


def _source(path: Path, format: Format | None) -> Source | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    chosen = format or (_FORMATS.get(suffixes[-1]) if suffixes else None)
    if chosen is None or (chosen == "parquet" and compression):
        return None
    return Source(path, chosen, compression, path.stat().st_size)  # type: ignore[arg-type]


def check_sources(sources: Sequence[Source], options: ReadOptions) -> None:
    """Looks at the head of every file: is the key there, is it text? A mistyped `--key` should not cost an
    hour.

    Raises:
        UserError: all problems found.
    """
    problems = Problems()
    for source in sources:
        problem = _check_parquet(source, options) if source.format == "parquet" else None
        if source.format == "jsonl":
            problem = _check_jsonl(source, options)
        if problem:
            problems.add(f"{source.path}: {problem}")
    problems.raise_if_any("input")


def _check_jsonl(source: Source, options: ReadOptions) -> str | None:
    try:
        with open_source(source) as stream:
            line = stream.readline(1 << 24).removeprefix(BOM)
    except UNPACKING_ERRORS as error:
        return f"cannot be read: {error}"
    if line.lstrip().startswith(b"["):
        return "is one JSON array; write one object per line"
    try:
        record = json.loads(line)
    except ValueError:
        return None  # reported with its line number when its turn comes, or skipped
    if isinstance(record, dict) and options.key not in record:
        has = name_some(record)
        return f'has no "{options.key}" in its first record, which has {has}; name the key with --key'
    return None


def _check_parquet(source: Source, options: ReadOptions) -> str | None:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(source.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        return f"is not a readable parquet file: {error}"
    if options.key not in schema.names:
        return f'has no column "{options.key}"; it has {name_some(schema.names)}; name the column with --key'
    kind = schema.field(options.key).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return f'column "{options.key}" holds {kind}, not text'
    return None


def name_some(names: Any) -> str:
    names = list(names)
    return ", ".join(f'"{name}"' for name in names[:8]) + (", ..." if len(names) > 8 else "")


def open_source(source: Source) -> Any:
    return unpack(source, open(source.path, "rb"))


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, a thousand in memory. Raises pyarrow.ArrowInvalid (a ValueError) and
    OSError."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def unpack(source: Source, raw: Any) -> Any:
    if source.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)  # type: ignore[arg-type]
    if source.compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw


def _line_at(path: Path, offset: int) -> int:
    """Number, from 1, of the line that begins at byte `offset`."""
    line = 1
    with open(path, "rb") as stream:
        while offset > 0 and (block := stream.read(min(offset, 1 << 24))):
            line += block.count(b"\n")
            offset -= len(block)
    return line
