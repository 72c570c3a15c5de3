"""The bytes of a checkpoint onto the disk: planned by megatron-core, written here.

A save has three parts, and only the first and the last need all ranks:

    plan      which rank writes which piece (data-parallel replicas share the work), nothing copied
    write     each rank its own files, fsynced and hashed - in the background when the save is asynchronous
    finish    rank 0 writes the index of all pieces and names the checkpoint

Megatron's own writer forks two processes a save and collects their results through a third; one of them
killed leaves the others waiting for ever. This one writes with threads and reports all that goes wrong.
"""

import ctypes
import hashlib
import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from solar_mega.runtime import parallel as ranks

_FILES_PER_RANK = 2
Bucket = tuple[str, str, tuple[list, list]]
"""One file: (path, name, (objects, tensors)), each a list of (what it is, content)."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote."""

    results: list[WriteResult]
    """Where each piece lies, for the index."""
    hashes: dict[str, str]
    """File name -> SHA-256 of its content; empty when hashes are not kept."""


@dataclass(frozen=True)
class Planned:
    """A save before anything is written."""

    writer: "Writer"
    index: Metadata | None
    """The pieces of all ranks; on rank 0."""


class PlanningStrategy(AsyncSaveShardedStrategy):
    """Megatron's `torch_dist` save as far as the plan, which `planned` then holds. What is unchanged from one
    save of a run to the next is exchanged between the ranks twice and then remembered."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.planned: Planned | None = None
        self._plans: tuple[SavePlan | None, SavePlan | None, bool] = (None, None, False)
        self._index: Metadata | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path):
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

        grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        writer = Writer(checkpoint_dir, thread_count=_FILES_PER_RANK)
        planned, *plans, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(grouped, False),
            writer,
            ranks.control_group(),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            cached_ckpt_structure=self._plans,
        )
        self._plans = tuple(plans)
        # The index is made anew until the plans have proved to be the same twice.
        self._index = planned[1] or self._index
        if self._index is not None:
            # Megatron adds every rank's plan to it, for a cache that is not used here; a reader has no use
            # for them either.
            vars(self._index).pop("all_local_plans", None)
        self.planned = Planned(writer, self._index)
        return AsyncRequest(None, (), [])


class Writer(FileSystemWriterAsync):
    """Holds what this rank writes. Unlike its parent it copies no tensor: on CUDA the copy to the host is
    `preload_tensors`, on a CPU a forked writer sees memory as it was."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.write_buckets = []
        for items in _split_by_size_and_type(self.thread_count, plan.items):
            if not items:
                continue
            name = f"{plan.storage_data.prefix}{len(self.write_buckets)}{DEFAULT_SUFFIX}"
            objects = [(i, planner.resolve_data(i)) for i in items if i.type == WriteItemType.BYTE_IO]
            tensors = [
                (i, planner.resolve_data(i).detach()) for i in items if i.type != WriteItemType.BYTE_IO
            ]
            self.write_buckets.append((os.path.join(self.checkpoint_dir, name), name, (objects, tensors)))

    def on_host(self) -> list[Bucket]:
        """The buckets with every tensor in host memory."""
        return self.preload_tensors(self.write_buckets, non_blocking=True)


def write_buckets(buckets: list[Bucket], hashed: bool) -> Written | Exception:
    """Writes this rank's files, fsynced. What goes wrong is returned: the other ranks must hear of it."""
    if not buckets:
        return Written([], {})
    try:
        with ThreadPoolExecutor(len(buckets)) as pool:
            parts = list(pool.map(partial(_write_bucket, hashed=hashed), buckets))
    except Exception as error:
        return error
    digests = {name: digest for name, _, digest in parts if digest is not None}
    return Written([result for _, results, _ in parts for result in results], digests)


def write_beside(rank: int, buckets: list[Bucket], report: str, trainer: int, hashed: bool) -> None:
    """`write_buckets` in a process of its own; what it returns is left in the file `report`.

    Ends with the trainer: a writer that outlives it would write into a checkpoint that a restarted run
    makes again.
    """
    _die_with(trainer)
    # torch makes its thread pool anew after a fork, at the first call that asks for it, and two threads that
    # ask at once find none. Here one asks, before there are two; and copying what is written needs no pool.
    torch.set_num_threads(1)
    outcome = write_buckets(buckets, hashed)
    try:
        content = pickle.dumps(outcome)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(outcome).__name__}: {outcome}"))
    with open(f"{report}.partial", "wb") as stream:
        stream.write(content)
    os.replace(f"{report}.partial", report)


def read_report(report: Path) -> Written | Exception:
    """What `write_beside` left."""
    try:
        return pickle.loads(report.read_bytes())
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        return RuntimeError(f"the writing process ended without a report ({error}); was it killed?")
    finally:
        report.unlink(missing_ok=True)


def _write_bucket(bucket: Bucket, hashed: bool) -> tuple[str, list[WriteResult], str | None]:
    path, name, (objects, tensors) = bucket
    results = []
    with open(path, "wb") as file:
        stream = _Stream(file, hashed)
        try:
            for item, content in objects:
                results.append(_written(stream, item, content, name))
            for item, tensor in tensors:
                # torch.save writes the whole storage of a view.
                whole = tensor.untyped_storage().size() == tensor.numel() * tensor.itemsize
                results.append(_written(stream, item, tensor if whole else tensor.clone(), name))
            file.flush()
            os.fsync(file.fileno())
        except Exception as error:
            raise stream.failure or error from error
    return name, results, stream.digest.hexdigest() if hashed else None


def _written(stream: IO[bytes], item: Any, content: Any, name: str) -> WriteResult:
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

    transforms = _StorageWriterTransforms()
    return _write_item(transforms, stream, content, item, name, SerializationFormat.TORCH_SAVE)


class _Stream:
    """A file that hashes what is written to it (torch.save only ever appends) and remembers why a write
    failed: torch's own error after it speaks of an "unexpected pos" in the archive, not of a full disk."""

    def __init__(self, file: IO[bytes], hashed: bool) -> None:
        self.file, self.digest = file, hashlib.sha256() if hashed else None
        self.tell, self.flush = file.tell, file.flush
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.digest is not None:
            self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, however it went."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(1)
