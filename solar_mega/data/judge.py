"""Judging one row of training data against benchmarks: FLAN task, shared n-gram, near duplicate."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from solar_mega.data.overlap import (
    SHORTEST,
    Hashes,
    NgramIndex,
    hash_words,
    ngram_hashes,
    texts_in,
    whole_hash,
    words_of,
)
from solar_mega.data.sources import find_sources, open_source, parquet_rows
from solar_mega.errors import Problems, UserError

_TESTS = ("test", "val")
_SHINGLE = 2  # words: benchmark texts are short, and one changed word must not hide them
_PERMUTATIONS = 128
_TASK_KEYS = ("task_name", "task")
_EVIDENCE = 200  # characters


@dataclass(frozen=True)
class Verdict:
    """Why a row goes."""

    reason: str
    """`flan-task`, `ngram`, `near-duplicate` or `unreadable`."""
    owner: int | None
    """Number of the benchmark record; None where there is none."""
    evidence: str


@dataclass
class Benchmarks:
    """What must not be in the training data."""

    index: NgramIndex
    places: list[str] = field(default_factory=list)
    """`file:line` of every record."""
    texts: list[tuple[int, Hashes]] = field(default_factory=list)
    """(record, shingle hashes) of every text of SHORTEST words or more."""
    too_short: int = 0

    def shingled(self, near: float) -> list[tuple[int, Hashes]]:
        return self.texts if near > 0 else []

    def facts(self) -> dict[str, int]:
        return {
            "records": len(self.places),
            "ngrams": self.index.ngrams,
            "too_short": self.too_short,
            "shortest": SHORTEST,
        }


def read_benchmarks(paths: Sequence[Path], ngram: int) -> Benchmarks:
    """Raises UserError listing what cannot be read."""
    found = Benchmarks(NgramIndex({}))
    by_record: list[tuple[int, list[list[str]]]] = []
    for file in _benchmark_files(paths):
        for place, record in _records(file):
            number = len(found.places)
            found.places.append(f"{file}:{place}")
            texts = [words for text in texts_in(record) if (words := words_of(text))]
            long = [words for words in texts if len(words) >= SHORTEST]
            found.too_short += len(texts) - len(long)
            by_record.append((number, long))
            found.texts += [(number, shingles(words)) for words in long]
    if ngram:
        found.index = NgramIndex.build(by_record, ngram)
    return found


def read_flan(paths: Sequence[Path], tasks: frozenset[str]) -> Hashes:
    """Sorted hashes of the inputs of FLAN rows that belong to `tasks`. Raises UserError when a file has no
    task names or inputs."""
    hashes: list[int] = []
    for source in find_sources([str(path) for path in paths]) if paths else []:
        for place, record in _records(source.path):
            task = _task_of(record)
            if task is None or not isinstance(record.get("inputs"), str):
                raise UserError(
                    f"--flan {source.path}:{place}: needs the fields inputs and task_name; it has "
                    f"{', '.join(list(record)[:8])}"
                )
            if task in tasks:
                hashes.append(whole_hash(words_of(record["inputs"])))
    return np.unique(np.asarray(hashes, dtype=np.uint64))


def _task_of(record: dict[str, Any]) -> str | None:
    return next((record[key] for key in _TASK_KEYS if isinstance(record.get(key), str)), None)


def shingles(words: Sequence[str]) -> Hashes:
    """Hashes of the pairs of neighbouring words."""
    return np.unique(ngram_hashes(hash_words(words), min(_SHINGLE, len(words))))


class Judge:
    """Pickled to the workers, opened there."""

    def __init__(
        self,
        index: Path,
        texts: list[tuple[int, Hashes]],
        flan: Hashes,
        flan_tasks: frozenset[str],
        near: float,
    ) -> None:
        self.folder, self.texts, self.flan, self.near = index, texts, flan, near
        self.flan_tasks = flan_tasks
        self.index: NgramIndex | None = None
        self.lsh: Any = None

    def open(self) -> "Judge":
        """Loads what does not travel. Raises UserError when near duplicates are wanted without datasketch."""
        self.index = NgramIndex.load(self.folder)
        if self.texts:
            self.lsh = _minhash_index(self.texts, self.near)
        return self

    def row(self, row: Any) -> Verdict | None:
        """The first reason to remove a row (a JSON line as bytes, or its value), or None."""
        if isinstance(row, bytes):
            if not row.strip():
                return None
            try:
                row = json.loads(row.decode("utf-8-sig"))
            except ValueError as error:
                return Verdict("unreadable", None, str(error)[:_EVIDENCE])
        assert self.index is not None
        texts = [words for text in texts_in(row) if (words := words_of(text))]
        return self._flan_task(row, texts) or self._ngram(texts) or self._near(texts)

    def _flan_task(self, row: Any, texts: list[list[str]]) -> Verdict | None:
        if isinstance(row, dict) and (task := _task_of(row)) in self.flan_tasks:
            return Verdict("flan-task", None, str(task))
        if not len(self.flan):
            return None
        for words in texts:
            wanted = np.uint64(whole_hash(words))
            at = int(np.searchsorted(self.flan, wanted))
            if at < len(self.flan) and self.flan[at] == wanted:
                return Verdict("flan-task", None, " ".join(words)[:_EVIDENCE])
        return None

    def _ngram(self, texts: list[list[str]]) -> Verdict | None:
        assert self.index is not None
        for words in texts:
            match = self.index.find(words)
            if match is not None:
                return Verdict("ngram", match.owner, match.words)
        return None

    def _near(self, texts: list[list[str]]) -> Verdict | None:
        if self.lsh is None:
            return None
        for words in texts:
            if len(words) < SHORTEST:
                continue
            mine = shingles(words)
            for key in self.lsh.query(_minhash(mine)):
                number, theirs = self.texts[key]
                common = len(np.intersect1d(mine, theirs, assume_unique=True))
                similarity = common / (len(mine) + len(theirs) - common)
                if similarity >= self.near:
                    return Verdict("near-duplicate", number, f"similarity {similarity:.2f}")
        return None


def _minhash(hashes: Hashes) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=_first_bytes)
    sketch.update_batch([int(value).to_bytes(8, "little") for value in hashes])
    return sketch


def _first_bytes(data: bytes) -> int:
    """The shingles are hashes already."""
    return int.from_bytes(data[:4], "little")


def _minhash_index(texts: list[tuple[int, Hashes]], near: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise UserError(
            "near duplicates need datasketch, which is not installed: pip install 'solar-mega[eval]', or "
            "--near 0 to leave them out"
        ) from None
    # Recall before precision: candidates are compared exactly.
    index = MinHashLSH(threshold=near, num_perm=_PERMUTATIONS, weights=(0.2, 0.8))
    with index.insertion_session() as session:
        for key, (_, hashes) in enumerate(texts):
            session.insert(key, _minhash(hashes))
    return index


def _benchmark_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    problems = Problems()
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet"))
            tests = [p for p in inside if p.name.startswith(_TESTS)]
            files += tests or inside
            if not inside:
                problems.add(f"--against {path}: no .jsonl, .json or .parquet file in this directory")
        elif path.is_file():
            files.append(path)
        else:
            problems.add(f"--against {path}: no such file or directory")
    problems.raise_if_any("benchmarks")
    return files


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, record)."""
    (source,) = find_sources([str(path)])
    if source.format == "parquet":
        yield from enumerate(parquet_rows(path), 1)
        return
    with open_source(source) as stream:
        if stream.read(1) == b"[":
            yield from enumerate(json.loads(b"[" + stream.read()), 1)
            return
    with open_source(source) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from error
