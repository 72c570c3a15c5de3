"""Text files to a Megatron corpus, over as many processes as there are cores.

    parent:   cut input into pieces ──▶ pool ──▶ results in input order ──▶ .bin, .idx, .json
    workers:  read a piece, split its documents into ids, append EOS to each, return bytes and lengths

The corpus is the same bytes for any number of workers.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from solar_mega.data.documents import Piece, Record, cut_into_pieces
from solar_mega.data.indexed import CorpusWriter, corpus_paths, token_dtype
from solar_mega.data.sources import (
    BadRecord,
    Format,
    ReadOptions,
    Source,
    check_sources,
    find_sources,
)
from solar_mega.data.tokenizer import Tokenizer, limit_to_one_thread
from solar_mega.errors import UserError
from solar_mega.runtime.console import Progress
from solar_mega.runtime.cores import available_cores

_BATCH_CHARACTERS = 1 << 20  # per call into the tokenizer: large enough to cost nothing, small in memory
_SHOWN = 5
_LARGEST_PIECE, _SMALLEST_PIECE = 4 << 20, 128 << 10
_PIECES_PER_WORKER = 8
_LONGEST_DOCUMENT = 2**31 - 1  # the index counts tokens of a document in int32


@dataclass
class Encoded:
    """A tokenised piece: ids as bytes in the corpus's dtype, document lengths int32 [documents]."""

    tokens: bytes = b""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    text_bytes: int = 0
    largest_id: int = -1
    empty: int = 0
    bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class TokenizeReport:
    """What a run of `tokenize` did. `text_bytes` are UTF-8 bytes of document text, `tokens` include one EOS
    per document, `empty` and `bad` are records that became no document."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest_id: int = -1
    empty: int = 0
    bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    workers: int = 1
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / max(self.text_bytes, 1)

    def add(self, piece: Encoded) -> None:
        self.documents += len(piece.lengths)
        self.tokens += int(piece.lengths.sum())
        self.text_bytes += piece.text_bytes
        self.largest_id = max(self.largest_id, piece.largest_id)
        self.empty += piece.empty
        self.bad += piece.bad
        self.first_bad = (self.first_bad + piece.first_bad)[:_SHOWN]


def tokenize(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    format: Format | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> TokenizeReport:
    """Writes `output`.bin, .idx and .json from all documents of `inputs`, EOS after each.

    Args:
        inputs: files, globs and directories (see documents.find_sources).
        output: prefix of the corpus.
        workers: processes; default: the cores this process may use. 1 works in this process.
        skip_bad: count records that are not usable text instead of stopping at them.
        overwrite: replace an existing corpus of that name.

    Raises:
        UserError: unusable input or output, a bad record, a corpus without documents, a full disk. Whatever
            happens, a corpus that looks complete is complete.
    """
    output, sources = check_request(inputs, output, options, format, skip_bad, overwrite)
    total = sum(source.nbytes for source in sources)
    workers = _worker_count(workers, total)
    piece_bytes = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, total // (workers * _PIECES_PER_WORKER)))
    pieces = cut_into_pieces(sources, options, piece_bytes)
    dtype = token_dtype(tokenizer.vocab_size)
    report, begin = TokenizeReport(output, workers=workers), time.perf_counter()
    with CorpusWriter(output, dtype) as writer, Progress(total, "bytes", "tokenize") as progress:
        for encoded in _encode_all(pieces, tokenizer, options, dtype, workers):
            report.add(encoded)
            if report.bad and not skip_bad:
                raise UserError(_bad_records(report.first_bad))
            writer.add(encoded.tokens, encoded.lengths)
            progress.advance(encoded.nbytes)
        if report.documents == 0:
            raise UserError(
                f"no documents in {_input_names(sources)}: {report.empty} empty, {report.bad} unusable; "
                f"nothing was written"
            )
        writer.commit(_description(report, tokenizer, dtype, sources))
    report.seconds = time.perf_counter() - begin
    return report


def check_request(
    inputs: Sequence[str],
    output: Path,
    options: ReadOptions,
    format: Format | None,
    skip_bad: bool,
    overwrite: bool,
) -> tuple[Path, list[Source]]:
    """The corpus to write and the files to read; what can be known to be wrong without a tokenizer is raised
    here as UserError, before the seconds that loading one may take."""
    output = _check_output(Path(output), overwrite)
    sources = find_sources(inputs, format)
    if not skip_bad:
        check_sources(sources, options)
    return output, sources


def _check_output(output: Path, overwrite: bool) -> Path:
    if output.suffix in (".bin", ".idx"):
        output = output.with_suffix("")
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; name a corpus in it, such as {output / 'corpus'}")
    present = [str(path) for path in corpus_paths(output) if path.exists()]
    if present and not overwrite:
        raise UserError(
            f"--output: {', '.join(present)} exists; choose another name, or --overwrite to replace it"
        )
    return output


def _worker_count(workers: int | None, total: int) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"--workers = {workers} must be at least 1")
    # a process that gets less than a piece or two costs more to start than it saves
    return workers or max(1, min(available_cores(), total // (4 * _SMALLEST_PIECE)))


def _description(
    report: TokenizeReport, tokenizer: Tokenizer, dtype: type, sources: Sequence[Source]
) -> dict[str, Any]:
    return {
        "format": 1,
        "documents": report.documents,
        "tokens": report.tokens,
        "text_bytes": report.text_bytes,
        "dtype": np.dtype(dtype).name,
        "largest_id": report.largest_id,
        "skipped_empty": report.empty,
        "skipped_bad": report.bad,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "name": tokenizer.path.name,
        },
        "sources": [{"name": source.path.name, "bytes": source.nbytes} for source in sources[:1000]],
    }


def _bad_records(bad: Sequence[BadRecord]) -> str:
    lines = "\n".join(f"  - {record.describe()}" for record in bad)
    return f"unusable records:\n{lines}\nmend them, or count and leave them out with --skip-bad"


def _input_names(sources: Sequence[Source]) -> str:
    return str(sources[0].path) if len(sources) == 1 else f"{len(sources)} files"


# ------------------------------------------------------------------------------------------------ encoding


def encode_piece(piece: Piece, tokenizer: Tokenizer, options: ReadOptions, dtype: type) -> Encoded:
    """Reads and tokenises one piece."""
    result, chunks, lengths = Encoded(nbytes=piece.nbytes), [], []
    for texts in _batches(piece.records(options), result):
        documents = tokenizer.encode_batch(texts)
        for ids in documents:
            ids.append(tokenizer.eos_id)
            if len(ids) > _LONGEST_DOCUMENT:
                raise UserError(
                    f"a document of {len(ids):,} tokens is longer than Megatron's index can hold; split it"
                )
        counts = np.fromiter(map(len, documents), np.int32, len(documents))
        flat = np.fromiter(chain.from_iterable(documents), dtype, int(counts.sum(dtype=np.int64)))
        result.largest_id = max(result.largest_id, int(flat.max()))
        chunks.append(flat.tobytes())
        lengths.append(counts)
    if lengths:
        result.tokens, result.lengths = b"".join(chunks), np.concatenate(lengths)
    return result


def _batches(records: Iterable[Record], result: Encoded) -> Iterator[list[str]]:
    """Non-empty texts in batches; everything else is counted in `result`."""
    batch, size = [], 0
    for record in records:
        if isinstance(record, str) and record:
            result.text_bytes += len(record) if record.isascii() else len(record.encode())
            batch.append(record)
            size += len(record)
        elif isinstance(record, str):
            result.empty += 1
        else:
            result.bad += 1
            if len(result.first_bad) < _SHOWN:
                result.first_bad.append(record)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    pieces: Iterator[Piece], tokenizer: Tokenizer, options: ReadOptions, dtype: type, workers: int
) -> Iterator[Encoded]:
    if workers == 1:
        limit_to_one_thread()
        return (encode_piece(piece, tokenizer, options, dtype) for piece in pieces)
    return ordered_map(_encode_in_worker, pieces, workers, _start_worker, (tokenizer, options, dtype))


_worker: tuple[Tokenizer, ReadOptions, type]


def _start_worker(*state: Any) -> None:
    global _worker
    limit_to_one_thread()
    _worker = state  # type: ignore[assignment]


def _encode_in_worker(piece: Piece) -> Encoded:
    return encode_piece(piece, *_worker)


# ------------------------------------------------------------------------------------------------ the pool


def ordered_map(
    function: Callable[[Any], Any],
    items: Iterator[Any],
    workers: int,
    initializer: Callable[..., None],
    state: tuple[Any, ...],
) -> Iterator[Any]:
    """`map` over spawned processes: results in order, a bounded number of items in flight, workers that leave
    when this process does, however it does."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _guarded, (initializer, state))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory; use fewer --workers, "
            "and split very large documents"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _guarded(initializer: Callable[..., None], state: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and ends the pool
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    initializer(*state)


def _leave_with_parent() -> None:
    """A killed parent closes nothing that an idle pool worker would notice; its sentinel does fire."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
