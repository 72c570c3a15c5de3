"""Content hashes of the models that are merged, computed beside the merge.

Free of torch, so that hashing begins before the rest of the program is loaded.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from solar_mega.artifact.lineage import HASH_CHUNK, Parent, directory_hash

if TYPE_CHECKING:
    from solar_mega.merge.plan import MergePlan

_APART = 4 << 30  # bytes of a model, at most
_PATIENCE = 0.005  # seconds between two looks


class Parents:
    """The parents of a merge.

    Merging follows hashing, and hashing waits for it, at most 4 GB of each model ahead and no more than stays
    in the page cache: the disk delivers every part once, and neither ends long after the other. Hashing goes
    first because it reads in the order of the disk. Megatron checkpoints, known by their run state, are not
    hashed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [path for path in dict.fromkeys(paths) if (path / "config.json").is_file()]
        self._apart = min(_APART, psutil.virtual_memory().total // 3 // max(1, len(self._paths)))
        self._hashed = dict.fromkeys(self._paths, 0.0)  # bytes
        self._begun = self._merged = 0.0  # bytes of each model
        self._share = 0.0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._hashes: dict[Path, Future[str]] = {}

    def __enter__(self) -> "Parents":
        if not self._hashes:
            self._pool = ThreadPoolExecutor(max(1, len(self._paths)), thread_name_prefix="hash")
            self._hashes = {path: self._pool.submit(self._hash, path) for path in self._paths}
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()

    def follow(self, plan: "MergePlan") -> None:
        """From here on hashing keeps pace with this merge."""
        inputs = sum(origin.info.nbytes for job in plan.jobs for origin in job.origins)
        on_disk = sum(model.tensors.total_bytes for model in plan.models.values())
        self._share = on_disk / max(1, inputs) / len(plan.models)

    @contextmanager
    def merging(self, nbytes: int) -> Iterator[None]:
        """The block merges the next `nbytes` of the inputs, over all models; waits until they were hashed.
        Raises UserError as soon as a model cannot be hashed."""
        with self._lock:
            self._begun += nbytes * self._share
            until = self._begun
        while any(hashed < min(until, self._merged + self._apart) for hashed in self._hashed.values()):
            if self._over.wait(_PATIENCE):
                break
        for known in self._hashes.values():
            if known.done():
                known.result()
        yield
        with self._lock:
            self._merged += nbytes * self._share

    def done(self, plan: "MergePlan") -> list[Parent]:
        """All parents; the merge is over, so nothing has to wait for it any more."""
        self._merged = float("inf")
        return [
            model.parent(self._hashes[path].result() if path in self._hashes else None)
            for path, model in plan.models.items()
        ]

    def _hash(self, path: Path) -> str:
        def stopped() -> bool:
            self._hashed[path] += HASH_CHUNK
            while self._hashed[path] > self._merged + self._apart and not self._over.is_set():
                time.sleep(_PATIENCE)
            return self._over.is_set()

        try:
            return directory_hash(path, stopped)
        finally:
            self._hashed[path] = float("inf")
