"""Megatron's indexed corpus on disk: `PREFIX.bin` and `PREFIX.idx`, written and checked with numpy alone.

    .bin  the token ids of all documents, one after the other, uint16 or int32
    .idx  b"MMIDIDX\\0\\0" | version 1 (u64) | dtype code (u8) | sequences n (u64) | document ends d (u64)
          | n lengths in tokens (i32) | n byte offsets (i64) | d sequence indices where documents end (i64)

The same bytes as megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder writes, without the seconds it
takes to import Megatron and torch, and with a vectorised index. Beside them lies `PREFIX.json`, ours:
which tokenizer made the corpus and how many documents, tokens and bytes it holds; stock Megatron ignores it.
"""

import contextlib
import fcntl
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solar_mega.errors import UserError
from solar_mega.runtime.files import disk_errors, sync_directory

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DOCUMENTS_PER_WRITE = 1 << 20


def token_dtype(vocab_size: int) -> type:
    """uint16 below 65500 tokens, int32 from there on: Megatron's own rule (DType.optimal_dtype)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def corpus_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """(.bin, .json, .idx) of a corpus, in the order in which they are put in place."""
    stem = str(prefix)
    return Path(stem + ".bin"), Path(stem + ".json"), Path(stem + ".idx")


class CorpusWriter:
    """Writes one corpus; nothing stands under its final names until `commit`.

    Tokens stream into `.NAME.bin.partial`, which stays locked: a second writer of the same corpus is refused,
    and a killed run leaves a file that the next one truncates. `commit` puts `.idx` in place last, and no
    reader takes a corpus without it for complete. Leaving the block without `commit` removes everything.
    """

    def __init__(self, prefix: Path, dtype: type) -> None:
        self.prefix = Path(prefix).absolute()
        self.dtype = np.dtype(dtype)
        self.lengths: list[np.ndarray] = []
        self._partial = [path.parent / f".{path.name}.partial" for path in corpus_paths(self.prefix)]

    def __enter__(self) -> "CorpusWriter":
        with disk_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._partial[0], "ab", buffering=1 << 20)
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._bin.close()
            raise UserError(
                f"{self.prefix} is being written by another run; wait for it or choose another --output"
            ) from error
        self._bin.truncate(0)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses the last buffer too; its error is on its way
            self._bin.close()
        for path in self._partial:
            path.unlink(missing_ok=True)

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Appends documents: their ids in this corpus's dtype, end to end, and their lengths in tokens
        (int32)."""
        assert len(tokens) == int(lengths.sum()) * self.dtype.itemsize
        with disk_errors(self.prefix):
            self._bin.write(tokens)
        self.lengths.append(lengths.astype(np.int32, copy=False))

    def commit(self, description: dict[str, Any]) -> None:
        """Flushes, writes index and description, and gives all three files their names."""
        final = corpus_paths(self.prefix)
        with disk_errors(self.prefix):
            self._partial[1].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            self._write_index(self._partial[2])
            self._bin.flush()
            for path in self._partial:
                _sync(path)
            final[2].unlink(missing_ok=True)  # an older corpus of this name is incomplete from here on
            for partial, path in zip(self._partial, final, strict=True):
                os.replace(partial, path)
            sync_directory(self.prefix.parent)

    def _write_index(self, path: Path) -> None:
        count = sum(len(lengths) for lengths in self.lengths)
        code = _CODES[self.dtype.type]
        with open(path, "wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
            for lengths in self.lengths:
                stream.write(lengths.tobytes())
            offset = 0
            for lengths in self.lengths:
                ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                stream.write((ends - lengths * np.int64(self.dtype.itemsize) + offset).tobytes())
                offset += int(ends[-1]) if len(ends) else 0
            for first in range(0, count + 1, _DOCUMENTS_PER_WRITE):
                stream.write(
                    np.arange(first, min(first + _DOCUMENTS_PER_WRITE, count + 1), dtype=np.int64).tobytes()
                )


@dataclass(frozen=True)
class Corpus:
    """What the files of a corpus say about it; no token has been read.

    Attributes:
        sequences: entries of the index; with our writer one per document.
        tokens: all ids, EOS included.
        description: contents of PREFIX.json, {} where there is none (corpora from other tools).
    """

    prefix: Path
    dtype: np.dtype
    sequences: int
    tokens: int
    description: dict[str, Any]

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens in the sequences first .. last - 1, from the byte offsets alone."""
        return self._token_at(last) - self._token_at(first)

    def read_tokens(self, first: int, count: int) -> np.ndarray:
        """Ids at positions first .. first + count - 1 of the .bin file (fewer at its end)."""
        path = corpus_paths(self.prefix)[0]
        return np.fromfile(
            path,
            self.dtype,
            count=max(0, min(count, self.tokens - first)),
            offset=first * self.dtype.itemsize,
        )

    def _token_at(self, sequence: int) -> int:
        if sequence >= self.sequences:
            return self.tokens
        offset = _HEADER.size + 4 * self.sequences + 8 * sequence
        with open(corpus_paths(self.prefix)[2], "rb") as stream:
            stream.seek(offset)
            return struct.unpack("<q", stream.read(8))[0] // self.dtype.itemsize


def open_corpus(prefix: Path | str) -> Corpus:
    """Checks that both files are there, well-formed and of the sizes they state.

    Raises:
        UserError: one of them is missing, not Megatron's, or cut short; the corpus is empty.
    """
    prefix = Path(prefix)
    bin_path, json_path, idx_path = corpus_paths(prefix)
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        hint = "; give the name without its suffix" if prefix.suffix in (".bin", ".idx") else ""
        raise UserError(f"{' and '.join(missing)} not found{hint}")
    size = idx_path.stat().st_size
    with open(idx_path, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{idx_path} is not a Megatron index")
        _, version, code, sequences, ends = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise UserError(f"{idx_path}: version {version} with dtype code {code} is not known")
        expected = _HEADER.size + 12 * sequences + 8 * ends
        if size < expected:  # multimodal corpora have a byte per sequence more
            raise UserError(f"{idx_path} is cut short: {size} bytes instead of {expected}")
        if sequences == 0:
            raise UserError(f"{prefix} holds no documents")
        last_length = np.fromfile(idx_path, np.int32, 1, offset=_HEADER.size + 4 * (sequences - 1))[0]
        last_offset = np.fromfile(
            idx_path, np.int64, 1, offset=_HEADER.size + 4 * sequences + 8 * (sequences - 1)
        )[0]
    dtype = np.dtype(_DTYPES[code])
    stated, actual = int(last_offset) + int(last_length) * dtype.itemsize, bin_path.stat().st_size
    if stated != actual:
        word = "is cut short" if actual < stated else "does not belong to its index"
        raise UserError(f"{bin_path} {word}: {actual} bytes, but {idx_path.name} describes {stated}")
    return Corpus(prefix, dtype, sequences, stated // dtype.itemsize, _read_description(json_path))


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); it describes the corpus beside it: tokenize again, or remove it"
        ) from error
    return description if isinstance(description, dict) and "tokenizer" in description else {}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
