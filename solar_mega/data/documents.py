"""Documents out of text files: cut into pieces of work, and read from a piece.

A piece names what to read rather than carrying it (a byte range of a file, rows of a parquet group, a few
small files), so that workers read for themselves and one big file occupies all of them. Only compressed
lines, which cannot be entered in the middle, are unpacked by the parent and carried in the piece.
Pieces keep the order of the input: the corpus does not depend on who read what.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from solar_mega.data.sources import (
    BOM,
    UNPACKING_ERRORS,
    BadRecord,
    ReadOptions,
    Source,
    name_some,
    open_source,
    unpack,
)
from solar_mega.errors import UserError

Record = str | BadRecord

_ROW_PIECE_BYTES = 32 << 20  # of decoded column: every piece of a row group decodes the rows before it again
_HALF_CHARACTER = "holds half of a surrogate pair (\\ud800 to \\udfff on its own), which is no text"


# ------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class LineRange:
    """The lines of an uncompressed file that begin at bytes start .. stop - 1."""

    source: Source
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def records(self, options: ReadOptions) -> Iterator[Record]:
        parse = _parse_jsonl if self.source.format == "jsonl" else _parse_line
        with open(self.source.path, "rb", buffering=1 << 20) as stream:
            if self.start:  # the line running across our start belongs to the piece before
                stream.seek(self.start - 1)
                stream.readline()
            place = stream.tell()
            while place < self.stop and (line := stream.readline()):
                record = parse(line.removeprefix(BOM) if place == 0 else line, options)
                if record is not None:
                    yield (
                        record
                        if isinstance(record, str)
                        else BadRecord(self.source.path, place, "byte", record.reason)
                    )
                place += len(line)


@dataclass(frozen=True)
class LineBlock:
    """Whole lines unpacked from a compressed file; `first` is the number of the first, `nbytes` their share
    of the file."""

    source: Source
    data: bytes
    first: int
    nbytes: int

    def records(self, options: ReadOptions) -> Iterator[Record]:
        parse = _parse_jsonl if self.source.format == "jsonl" else _parse_line
        for number, line in enumerate(io.BytesIO(self.data), self.first):
            record = parse(line.removeprefix(BOM) if number == 0 else line, options)
            if record is not None:
                yield (
                    record
                    if isinstance(record, str)
                    else BadRecord(self.source.path, number, "line", record.reason)
                )


@dataclass(frozen=True)
class RowRange:
    """Rows start .. stop - 1 of one row group of a parquet file; `first` is the group's first row in the
    file."""

    source: Source
    group: int
    first: int
    start: int
    stop: int
    nbytes: int

    def records(self, options: ReadOptions) -> Iterator[Record]:
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(self.source.path) as file:
                for batch in file.iter_batches(
                    1024, row_groups=[self.group], columns=[options.key], use_threads=False
                ):
                    begin, end = max(self.start - row, 0), min(self.stop - row, batch.num_rows)
                    for place, text in enumerate(
                        batch.column(0).slice(begin, max(0, end - begin)).to_pylist(), row + begin
                    ):
                        yield (
                            text
                            if text is not None
                            else BadRecord(self.source.path, self.first + place, "row", "is null")
                        )
                    row += batch.num_rows
                    if row >= self.stop:
                        return
        except (
            ValueError,
            OSError,
        ) as error:  # ArrowInvalid is a ValueError, and so is text that is not UTF-8
            raise UserError(f"{self.source.path} is damaged: {error}") from error


@dataclass(frozen=True)
class WholeFiles:
    """Text files of which each is one document."""

    sources: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def records(self, options: ReadOptions) -> Iterator[Record]:
        for source in self.sources:
            try:
                with open_source(source) as stream:
                    yield stream.read().removeprefix(BOM).decode("utf-8")
            except UnicodeDecodeError as error:
                yield BadRecord(source.path, 0, "file", f"not UTF-8 ({error.reason} at byte {error.start})")
            except UNPACKING_ERRORS as error:
                raise UserError(f"{source.path} cannot be read: {error}") from error


Piece = LineRange | LineBlock | RowRange | WholeFiles


def cut_into_pieces(
    sources: Sequence[Source], options: ReadOptions, piece_bytes: int = 4 << 20
) -> Iterator[Piece]:
    """All work in input order, in pieces of about `piece_bytes` bytes of input."""
    whole: list[Source] = []
    for source in sources:
        if source.format == "txt" and options.txt_document == "file":
            whole.append(source)
            if sum(member.nbytes for member in whole) >= piece_bytes:
                yield WholeFiles(tuple(whole))
                whole = []
            continue
        if whole:
            yield WholeFiles(tuple(whole))
            whole = []
        if source.format == "parquet":
            yield from _row_ranges(source, options)
        elif source.compression:
            yield from _line_blocks(source, piece_bytes)
        else:
            for start in range(0, source.nbytes, piece_bytes):
                yield LineRange(source, start, min(start + piece_bytes, source.nbytes))
    if whole:
        yield WholeFiles(tuple(whole))


def _row_ranges(source: Source, options: ReadOptions) -> Iterator[RowRange]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(source.path)
    column = next(
        i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == options.key
    )
    first, left = 0, source.nbytes
    for group in range(metadata.num_row_groups):
        rows, size = (
            metadata.row_group(group).num_rows,
            metadata.row_group(group).column(column).total_uncompressed_size,
        )
        step = max(1, -(-rows // max(1, -(-size // _ROW_PIECE_BYTES))))
        for start in range(0, rows, step):
            last = group == metadata.num_row_groups - 1 and start + step >= rows
            share = left if last else source.nbytes * min(step, rows - start) // metadata.num_rows
            left -= share
            yield RowRange(source, group, first, start, min(start + step, rows), share)
        first += rows


def _line_blocks(source: Source, piece_bytes: int) -> Iterator[LineBlock]:
    line, before = 0, 0
    try:
        with open(source.path, "rb") as raw, unpack(source, raw) as stream:
            while data := stream.read(piece_bytes):
                data += stream.readline()
                read = raw.tell()
                yield LineBlock(source, data, line, read - before)
                line, before = line + data.count(b"\n"), read
    except UNPACKING_ERRORS as error:
        raise UserError(f"{source.path} cannot be unpacked after line {line}: {error}") from error


# -------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class _Bad:
    reason: str


def _parse_jsonl(line: bytes, options: ReadOptions) -> str | _Bad | None:
    if line.isspace():
        return None
    try:
        record = json.loads(line.decode("utf-8"))  # given bytes, json would let broken surrogates pass
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except ValueError as error:
        return _Bad(f"not JSON ({error})")
    if not isinstance(record, dict):
        return _Bad(f"a JSON {type(record).__name__}, not an object")
    text = record.get(options.key)
    if isinstance(text, str):
        return _Bad(_HALF_CHARACTER) if b"\\ud" in line.lower() and not _encodable(text) else text
    if options.key not in record:
        return _Bad(f'no "{options.key}" (it has {name_some(record)}); name the key with --key')
    return _Bad(f'"{options.key}" is {"null" if text is None else "a " + type(text).__name__}, not a string')


def _parse_line(line: bytes, options: ReadOptions) -> str | _Bad | None:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
