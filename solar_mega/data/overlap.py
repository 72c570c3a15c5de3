"""Does a text contain a piece of a benchmark? n-grams of normalised words, looked up by 64-bit hashes.

    normalised   Unicode compatibility forms, case, punctuation and spaces do not count; a CJK sign is a word
    n-gram       13 words (as GPT-3, arXiv 2005.14165, appendix C); a benchmark text of 8 to 12 words is
                 looked for as a whole, a shorter one not at all: it would be found everywhere
    hash         of a word blake2b; of n words  sum of h_i * M^(n - 1 - i)  modulo 2^64, all at once in numpy

The index is a sorted array per length: 16 bytes per benchmark n-gram, shared between processes as a file.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SHORTEST = 8
"""Words of the shortest benchmark text that is looked for."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word is lost modulo 2^64
_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff])")
_APOSTROPHES = re.compile(r"['’ʼ`]")
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words that count. `Don't  STOP-me!` gives dont, stop, me."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_CJK.sub(r" \1 ", _APOSTROPHES.sub("", text)))


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def hash_words(words: Sequence[str]) -> Hashes:
    """[n]"""
    return np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))


def ngram_hashes(hashes: Hashes, length: int) -> Hashes:
    """Hashes of all runs of `length` words: [max(0, n - length + 1)]."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(length):
            total = total * _MULTIPLIER + hashes[place : place + count]
    return total


def whole_hash(words: Sequence[str]) -> int:
    """Of a text as a whole; texts that are equal when normalised share it."""
    return int(ngram_hashes(hash_words(words), len(words))[0]) if words else 0


def texts_in(record: Any) -> Iterator[str]:
    """Every string in a JSON value, keys left out."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for value in record.values():
            yield from texts_in(value)
    elif isinstance(record, list):
        for value in record:
            yield from texts_in(value)


@dataclass(frozen=True)
class Match:
    """A benchmark text found in a record."""

    owner: int
    """Number of the benchmark record."""
    words: str
    """The words in common."""


class NgramIndex:
    """All n-grams of benchmark records, by length."""

    def __init__(self, tables: dict[int, tuple[Hashes, NDArray[np.int64]]]) -> None:
        self.tables = tables

    @classmethod
    def build(cls, records: Iterable[tuple[int, Iterable[Sequence[str]]]], length: int) -> "NgramIndex":
        """`records`: (number, the words of each of its texts)."""
        hashes: dict[int, list[Hashes]] = {}
        owners: dict[int, list[NDArray[np.int64]]] = {}
        for number, texts in records:
            for words in texts:
                if len(words) < min(SHORTEST, length):
                    continue
                size = min(length, len(words))
                found = ngram_hashes(hash_words(words), size)
                hashes.setdefault(size, []).append(found)
                owners.setdefault(size, []).append(np.full(len(found), number, dtype=np.int64))
        tables = {}
        for size, parts in hashes.items():
            unique, first = np.unique(np.concatenate(parts), return_index=True)
            tables[size] = (unique, np.concatenate(owners[size])[first])
        return cls(tables)

    def save(self, folder: Path) -> None:
        for size, (hashes, owners) in self.tables.items():
            np.save(folder / f"{size}.hashes.npy", hashes)
            np.save(folder / f"{size}.owners.npy", owners)

    @classmethod
    def load(cls, folder: Path) -> "NgramIndex":
        """Memory-mapped, so that processes share it."""
        tables = {}
        for path in folder.glob("*.hashes.npy"):
            size = int(path.name.partition(".")[0])
            owners = np.load(folder / f"{size}.owners.npy", mmap_mode="r")
            tables[size] = (np.load(path, mmap_mode="r"), owners)
        return cls(tables)

    @property
    def ngrams(self) -> int:
        return sum(len(hashes) for hashes, _ in self.tables.values())

    def find(self, words: Sequence[str]) -> Match | None:
        """The first benchmark text in `words`, the longest kind first."""
        hashes = hash_words(words)
        for size in sorted(self.tables, reverse=True):
            table, owners = self.tables[size]
            wanted = ngram_hashes(hashes, size)
            if not len(wanted):
                continue
            places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
            hits = np.flatnonzero(table[places] == wanted)
            if len(hits):
                at = int(hits[0])
                return Match(int(owners[places[at]]), " ".join(words[at : at + size]))
        return None
