"""Saving a run: synchronous or beside the training, complete or not there at all.

    saver = Saver(store, asynchronous=True)
    saver.save(chunks, optimizer, state)      returns when the state may change again
    saver.poll()                              between steps: commits what has been written meanwhile
    saver.wait()                              until nothing is pending
    saver.close()

One save at a time: a second one waits for the first. All of these are collective.
"""

import os
import signal
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from solar_mega.checkpoint.fit import save_failure, sharded_tensors
from solar_mega.checkpoint.layout import (
    METADATA,
    current_layout,
    model_entries,
    replicas,
    rng_entry,
    unwrapped,
)
from solar_mega.checkpoint.optimizer_state import optimizer_state_dict
from solar_mega.checkpoint.run_state import RunState, write_run_state
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.checkpoint.writing import (
    Planned,
    PlanningStrategy,
    Written,
    read_report,
    write_beside,
    write_buckets,
)
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.files import require_space, require_writable
from solar_mega.runtime.signals import StopRequest

_PROBE = 32 << 10
"""Bytes written on trial: what rank 0 writes before the ranks part must not fail on it alone."""


def save_checkpoint(
    store: CheckpointStore, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, state: RunState
) -> Path:
    """Saves this run at `state.step`, once, and commits it; see `Saver.save`. Returns its directory."""
    Saver(store).save(chunks, optimizer, state)
    return store.path(state.step)


@dataclass(frozen=True)
class _Pending:
    state: RunState
    place: Path
    planned: Planned


class Saver:
    """Saves one run again and again; what does not change between its saves is worked out once."""

    def __init__(self, store: CheckpointStore, asynchronous: bool = False, hashed: bool = True) -> None:
        """`hashed`: keep a SHA-256 of every file, so that `checkpoint.verify` can tell a flipped bit."""
        self.store, self.asynchronous, self.hashed = store, asynchronous, hashed
        self._plan = PlanningStrategy()
        self._strategy: FullyParallelSaveStrategyWrapper | None = None
        self._calls: AsyncCallsQueue | None = None
        self._pending: _Pending | None = None
        self._report = Path(tempfile.gettempdir(), f"solar_mega-save-{os.getpid()}-{uuid.uuid4().hex[:8]}")

    def save(
        self, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, state: RunState
    ) -> Path | None:
        """Saves this run at `state.step`; older checkpoints are pruned when it is complete.

        Args:
            chunks: the model's chunks of this rank, plain or under DDP.
            optimizer: None saves weights only; such a checkpoint can be loaded, not resumed.
            state: its `parallel` is completed with the layout at hand.

        Returns the checkpoint's directory, or None where it is still being written.

        Raises UserError when the disk is full or a file cannot be written, now or by the save before this
        one; the unfinished checkpoint is then removed, and older ones and `latest` are as before.
        """
        self.wait()
        state = replace(state, parallel={**state.parallel, **current_layout()})
        contents = _contents([unwrapped(chunk) for chunk in chunks], optimizer)
        needed = _bytes_to_write(contents)

        ranks.on_main(partial(self._prepare, state.step, needed))
        self._pending = self._planned(contents, state)
        if self.asynchronous:
            self._start(self._pending)
            return None
        return self._finish(write_buckets(self._pending.planned.writer.on_host(), self.hashed))

    @property
    def pending(self) -> int | None:
        """Step of the checkpoint that is still being written."""
        return None if self._pending is None else self._pending.state.step

    def poll(self) -> Path | None:
        """Commits the pending checkpoint if all ranks have written their files. Raises as `save` does."""
        return self._collect(blocking=False)

    def wait(self) -> Path | None:
        """Waits for the pending checkpoint and commits it. Raises as `save` does."""
        return self._collect(blocking=True)

    def close(self, abort: bool = False) -> None:
        """Ends the writing process. `abort`: at once, whatever it is doing; its checkpoint stays
        unfinished. Not collective then."""
        if not abort:
            self.wait()
        if self._calls is None:
            return
        if abort:
            for call in self._calls.async_calls:
                call.async_caller.close(abort=True)
            self._calls.async_calls.clear()
        self._calls.close(abort=abort)
        self._calls, self._pending = None, None
        self._report.unlink(missing_ok=True)

    def _prepare(self, step: int, needed: int) -> None:
        try:
            require_space(self.store.root, needed)
            require_writable(self.store.partial(step), _PROBE)
        except BaseException as error:
            self.store.discard(step)
            if isinstance(error, UserError):
                text = f"saving {self.store.path(step)} failed: {error}; older ones are untouched"
                raise UserError(text) from error
            raise

    def _planned(self, contents: dict[str, Any], state: RunState) -> _Pending:
        """Who writes what. Megatron checks that every byte has one owner; once is enough for a run."""
        place, first = self.store.partial_path(state.step), self._strategy is None
        if first:
            self._strategy = FullyParallelSaveStrategyWrapper(
                self._plan, replicas(), do_cache_distribution=True
            )
        dist_checkpointing.save(
            contents,
            str(place),
            self._strategy,
            validate_access_integrity=first,
            async_sharded_save=True,
            content_metadata=dict(METADATA),
        )
        return _Pending(state, place, self._plan.planned)

    def _start(self, pending: _Pending) -> None:
        """Hands the buckets to megatron-core's asynchronous caller: on CUDA a process kept between saves,
        which fetches the tensors itself; on a CPU a fork, which sees memory as it is now and costs no copy.
        """
        if self._calls is None:
            self._calls = AsyncCallsQueue(persistent=torch.cuda.is_available())
        writer = pending.planned.writer
        request = AsyncRequest(
            partial(write_beside, trainer=os.getpid(), hashed=self.hashed),
            (ranks.rank(), writer.write_buckets, str(self._report)),
            [],
            preload_fn=partial(writer.preload_tensors, writer.write_buckets, True),
        )
        # Batch systems send their signals to every process of a job; the writer inherits a mask that leaves
        # them to the trainer.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        try:
            self._calls.schedule_async_request(request)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _collect(self, blocking: bool) -> Path | None:
        if self._pending is None or not self._calls.maybe_finalize_async_calls(blocking=blocking):
            return None
        return self._finish(read_report(self._report))

    def _finish(self, mine: Written | Exception) -> Path:
        pending, self._pending = self._pending, None
        outcomes: list | None = [None] * ranks.world_size() if ranks.is_main() else None
        dist.gather_object(_portable(mine), outcomes, group=ranks.control_group())
        step, store = pending.state.step, self.store

        def finish() -> None:
            try:
                hashes = _index(pending, outcomes, self.hashed)
                write_run_state(pending.place, pending.state, hashes)
                store.commit(step)
            except BaseException as error:
                store.discard(step)
                if isinstance(error, Exception) and not isinstance(error, UserError):
                    raise UserError(save_failure(store.path(step), error)) from error
                raise

        ranks.on_main(finish)
        return store.path(step)


def _index(pending: _Pending, outcomes: list[Written | Exception], hashed: bool) -> dict[str, str] | None:
    """The index of all pieces, and Megatron's note of the format. Returns all files' hashes if kept."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    pending.planned.writer.finish(pending.planned.index, [outcome.results for outcome in outcomes])
    save_config(CheckpointingConfig("torch_dist", 1), str(pending.place))
    return {name: d for outcome in outcomes for name, d in outcome.hashes.items()} if hashed else None


def _portable(outcome: Written | Exception) -> Written | Exception:
    """Some exceptions cannot be pickled; their text can."""
    if isinstance(outcome, Written) or type(outcome) in (OSError, RuntimeError):
        return outcome
    return RuntimeError(f"{type(outcome).__name__}: {outcome}")


def _contents(modules: list[nn.Module], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(dict(METADATA))
    contents: dict[str, Any] = {
        key: module.sharded_state_dict(metadata=metadata) for key, module in model_entries(modules).items()
    }
    if optimizer is not None:
        contents["optimizer"] = optimizer_state_dict(optimizer, dict(contents), metadata, loading=False)
    contents.update(rng_entry())
    return contents


def _bytes_to_write(contents: dict[str, Any]) -> int:
    mine = sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in sharded_tensors(contents)
        if is_main_replica(tensor.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64)
    dist.all_reduce(total, group=ranks.control_group())
    return int(total)
