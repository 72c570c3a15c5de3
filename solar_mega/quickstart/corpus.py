"""Real text that every machine has: the source of Python's own standard library."""

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from solar_mega.errors import UserError
from solar_mega.runtime.files import atomic_file

# Tests repeat themselves; the others are tables written as Python rather than programs.
_SKIPPED_DIRECTORIES = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages",
    "__pycache__", "encodings", "pydoc_data", "ensurepip",
}  # fmt: skip
_LARGEST_FILE = 150_000
_SMALLEST_FILE = 200


@dataclass(frozen=True)
class CorpusStats:
    """Files and UTF-8 bytes of text in train.jsonl and valid.jsonl."""

    train_files: int
    train_bytes: int
    valid_files: int
    valid_bytes: int


def write_corpus(
    out_dir: Path, max_bytes: int = 6_000_000, valid_share: float = 0.05, seed: int = 0
) -> CorpusStats:
    """Writes `out_dir`/train.jsonl and valid.jsonl: one object per file with its `text` and `path`.

    Files come in an order shuffled with `seed`; the first ones, to `valid_share` of the bytes, are held out,
    and training takes the rest up to `max_bytes` in all. The same interpreter gives the same corpus.

    Raises:
        UserError: this Python has no readable standard library on disk.
    """
    files = list(_library_files(Path(sysconfig.get_paths()["stdlib"])))
    if not files:
        raise UserError(
            f"no Python source files under {sysconfig.get_paths()['stdlib']}; "
            "the quickstart trains on them: use a Python with its standard library as files"
        )
    random.Random(seed).shuffle(files)
    available = min(max_bytes, sum(len(text.encode()) for _, text in files))
    sizes, counts = {"valid": 0, "train": 0}, {"valid": 0, "train": 0}
    with (
        atomic_file(Path(out_dir) / "train.jsonl") as train,
        atomic_file(Path(out_dir) / "valid.jsonl") as valid,
    ):
        for name, text in files:
            size = len(text.encode())
            if sizes["valid"] + sizes["train"] + size > available:
                continue
            part = "valid" if sizes["valid"] < valid_share * available else "train"
            json.dump({"path": name, "text": text}, valid if part == "valid" else train)
            (valid if part == "valid" else train).write("\n")
            sizes[part] += size
            counts[part] += 1
    return CorpusStats(counts["train"], sizes["train"], counts["valid"], sizes["valid"])


def _library_files(root: Path) -> Iterator[tuple[str, str]]:
    """(path relative to the library, text) of every usable file, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts) or not path.is_file():
            continue
        data = path.read_bytes()
        if not _SMALLEST_FILE <= len(data) <= _LARGEST_FILE:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if "▁" not in text:  # the one character that SentencePiece cannot give back
            yield relative.as_posix(), text
