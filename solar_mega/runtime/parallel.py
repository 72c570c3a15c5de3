"""Processes, devices and Megatron's process groups: started once, stopped once.

    rank = tp + TP * (dp + DP * pp)         neighbours share a layer, distant ranks a replica or stage

NCCL where there is CUDA, gloo through `runtime.cpu` where there is not. A program started without torchrun is
a world of one.
"""

import atexit
import datetime
import gc
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import LostRank, UserError
from solar_mega.runtime import cpu

START_TIMEOUT = 1800.0
"""Seconds that a collective may take until `set_timeout` says otherwise: nodes start at different times."""


def start(parallel: ParallelConfig, seed: int = 1234, threads: int | None = None) -> None:
    """Join the world, build Megatron's process groups and seed every generator.

    Args:
        parallel: layout; `parallel.dp` may be None and is then world size / (tp * pp).
        seed: base seed; Megatron offsets it per stage and tensor-parallel rank where streams must differ.
        threads: CPU threads of this process (ignored on CUDA); default cores / local ranks.

    Raises:
        UserError: the world size is not tp * pp * dp.
    """
    check_world_size(parallel, int(os.environ.get("WORLD_SIZE", "1")))
    join_world()
    if not torch.cuda.is_available():
        cpu.install()
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    parallel_state, tensor_parallel = _megatron()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave the groups in order. Safe to call when nothing was started; `start` may follow again.

    A group goes, and its threads with it, when the last reference goes (`_let_go`).
    """
    global _control
    if not dist.is_initialized():
        return
    if "megatron.core.parallel_state" in sys.modules:
        parallel_state, _ = _megatron()
        parallel_state.destroy_model_parallel()
        for name, value in vars(parallel_state).items():  # it forgets some
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
    _control = None
    dist.destroy_process_group()


@contextmanager
def running(parallel: ParallelConfig, seed: int = 1234, threads: int | None = None):
    """`start` and, however the block ends, `stop`. Raises LostRank in place of what the transport says when
    another rank has gone."""
    start(parallel, seed, threads)
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        # The rank that failed first is still printing why.
        time.sleep(1.0)
        said = str(error).strip().splitlines()[0][:200]
        raise LostRank(
            f"another rank ended, so rank {rank()} does too; the error of that rank is the one that counts "
            f"({said})"
        ) from error
    finally:
        stop()


_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


def _is_lost_contact(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistNetworkError):
        return True
    transport = isinstance(error, dist.DistBackendError) or "gloo" in str(error)
    return transport and any(words in str(error) for words in (*_LOST_CONTACT, "Timed out", "remote process"))


def check_world_size(parallel: ParallelConfig, world: int) -> None:
    model = parallel.tp * parallel.pp
    if parallel.dp is not None and world != model * parallel.dp:
        raise UserError(
            f"world size {world} is not parallel.tp * parallel.pp * parallel.dp = {parallel.tp} * "
            f"{parallel.pp} * {parallel.dp} = {model * parallel.dp}; start {model * parallel.dp} processes "
            "or change the layout"
        )
    if world % model:
        raise UserError(
            f"world size {world} is not a multiple of parallel.tp * parallel.pp = {parallel.tp} * "
            f"{parallel.pp} = {model}; start a multiple of {model} processes or change the layout"
        )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


_control: dist.ProcessGroup | None = None


def control_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for host-side traffic (decisions, objects, exported tensors). Collective on
    first use."""
    global _control
    if _control is None:
        _control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _control


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Collective: each flag, raised on any rank. One exchange for all of them."""
    raised = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=control_group())
    return tuple(bool(flag) for flag in raised.tolist())


def gather(value: Any) -> list[Any]:
    """Collective: what each rank gave, by rank. For small objects."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def agree(error: Exception | None) -> None:
    """Collective. If any rank failed, all ranks raise: that rank its own error, the others a short note of
    it.

    Without this a rank that raises alone leaves the others waiting in their next collective.
    """
    texts = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(r, text) for r, text in enumerate(texts) if text is not None]
    if failed:
        raise UserError(f"rank {failed[0][0]} failed: {failed[0][1]}")


@contextmanager
def together():
    """Collective: the block ends well on all ranks, or raises on all (see `agree`). No collectives inside."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    agree(error)


def on_main(action: Callable[[], None]) -> None:
    """Collective: runs `action` on rank 0; when it raises, all ranks raise (see `agree`)."""
    error = None
    if is_main():
        try:
            action()
        except Exception as raised:
            error = raised
    agree(error)


def set_timeout(seconds: float) -> None:
    """What a collective of any group may take from now on."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


_joined = 0


def join_world() -> None:
    """The process group of all ranks, without Megatron's; `start` calls it. Does nothing when it exists."""
    if dist.is_initialized():
        return
    # Imported later it would have the world as its functions' default argument, for ever.
    import torch.distributed.nn.functional  # noqa: F401

    atexit.unregister(_let_go)
    atexit.register(_let_go)
    # megatron-core 0.16 calls collectives by names that torch 2.13 announces to rename; nothing for a user to
    # act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=START_TIMEOUT)
    if "WORLD_SIZE" in os.environ:
        global _joined
        _joined += 1
        store, my_rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # The launcher's store outlives a world; without its own prefix a second one would meet the addresses
        # of the first, and wait for sockets that no longer listen.
        store = dist.PrefixStore(f"world {_joined}", store)
        dist.init_process_group(backend, store=store, rank=my_rank, world_size=world, timeout=timeout)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", world_size=1, rank=0, timeout=timeout)


def _let_go() -> None:
    """Frees what models and optimizers, which refer to themselves, still hold of groups that were left.

    gloo's threads let go of tensors, for which they need Python. One that is late for the interpreter's end
    aborts the process ("terminate called without an active exception"), after all its work is done.
    """
    gc.collect()


def _megatron():
    """Megatron's state modules. Imported late and quietly: each missing accelerator costs a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state, tensor_parallel
    return parallel_state, tensor_parallel
