"""Megatron distributed checkpoints: saved from any layout, loaded on any other, through a layer map.

The files are stock `megatron.core.dist_checkpointing` (torch_dist): one tensor per layer and parameter,
optimizer states in the shape of their parameters (`fully_reshardable`), random generators per rank; beside
them `run_state.json`. All functions here are collective: every rank calls them.
"""

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from solar_mega.checkpoint.fit import (
    check_depth,
    check_optimizer,
    check_tensors,
    readable,
    save_failure,
    sharded_tensors,
)
from solar_mega.checkpoint.optimizer_state import load_optimizer_state, optimizer_state_dict
from solar_mega.checkpoint.remap import SourceDepth, mapped_state_dict
from solar_mega.checkpoint.run_state import (
    RunState,
    check_files,
    describe_megatron,
    read_run_state,
    write_run_state,
)
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime import random_state
from solar_mega.runtime.console import say
from solar_mega.runtime.files import require_space

__all__ = [
    "RunState",
    "describe_megatron",
    "load_checkpoint",
    "load_tensors",
    "read_run_state",
    "save_checkpoint",
]

_METADATA = {
    "non_homogeneous_layers": True,
    # Explicit: the default is a deprecated format, and only this one follows a layer map or another TP.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
_RNG = "rng_state"


def save_checkpoint(
    store: CheckpointStore, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, state: RunState
) -> Path:
    """Saves this run at `state.step` and commits it; older checkpoints are pruned afterwards.

    Args:
        chunks: the model's chunks of this rank, plain or under DDP.
        optimizer: None saves weights only; such a checkpoint can be loaded, not resumed.
        state: its `parallel` is completed with the layout at hand.

    Returns the checkpoint's directory. Raises UserError when the disk is full or a file cannot be written;
    the unfinished checkpoint is then removed, and older ones and `latest` are as before.
    """
    state = replace(state, parallel={**state.parallel, **_layout()})
    contents = _contents([_unwrapped(chunk) for chunk in chunks], optimizer)
    needed = _bytes_to_write(contents)

    def prepare() -> None:
        require_space(store.root, needed)
        store.partial(state.step)

    _on_main(prepare)
    place = store.partial_path(state.step)
    try:
        with _own_results_queue():
            dist_checkpointing.save(contents, str(place), content_metadata=dict(_METADATA))
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        # A failed write is broadcast by Megatron, so all ranks are here; other failures end this process,
        # and the launcher ends the rest. Either way nothing collective may follow.
        if ranks.is_main():
            store.discard(state.step)
        raise UserError(save_failure(store.path(state.step), error)) from error

    def finish() -> None:
        try:
            write_run_state(place, state)
            store.commit(state.step)
        except BaseException:
            store.discard(state.step)
            raise

    _on_main(finish)
    return store.path(state.step)


def load_checkpoint(
    path: Path | str,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    layer_map: LayerMap | None = None,
) -> RunState:
    """Fills this rank's chunks, and the optimizer where one is given, from a checkpoint of any layout.

    Args:
        chunks: plain or under DDP, at the depth of `layer_map`.
        optimizer: None loads weights only. An optimizer that was built before and keeps master weights then
            needs `optimizer.reload_model_params()`.
        layer_map: grows the model: target layer -> the checkpoint's layer, weights and optimizer states
            alike. None resumes: the depth must agree, and the random generators are restored on the same
            layout, or seeded anew from (seed, step), with a message, on another.

    Raises UserError when files are missing or damaged, or the checkpoint does not hold what the model needs.
    """
    path = Path(path)
    _on_main(lambda: check_files(path))
    state = read_run_state(path)
    same_layout = state.parallel.items() >= _layout().items()
    resume = layer_map is None
    rng = _load(path, chunks, optimizer, layer_map, with_rng=resume and same_layout)
    if rng is not None:
        random_state.restore(rng)
    elif resume:
        random_state.reseed(state.seed, state.step)
        say(
            f"{path.name} was saved on {_spell(state.parallel)} and is loaded on {_spell(_layout())}: random "
            f"streams are seeded anew from seed {state.seed} and step {state.step}; weights, optimizer and "
            "data position are exact"
        )
    return state


def load_tensors(
    path: Path | str,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    layer_map: LayerMap | None = None,
) -> None:
    """`load_checkpoint` for a checkpoint that another Megatron program wrote: tensors only, no run state.

    Takes per-layer and homogeneous checkpoints. Optimizer states must be `fully_reshardable`.
    """
    _load(Path(path), chunks, optimizer, layer_map, with_rng=False)


def _load(
    path: Path,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
    layer_map: LayerMap | None,
    with_rng: bool,
) -> dict[str, Any] | None:
    """Fills chunks and optimizer; returns this rank's random state when asked for and there."""
    modules = [_unwrapped(chunk) for chunk in chunks]
    with readable(path):
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        shapes = {key: tuple(tensor.global_shape) for key, tensor in stored.items()}
        metadata = {**_METADATA, **(dist_checkpointing.load_content_metadata(str(path)) or {})}
    source = SourceDepth.of(shapes)
    layer_map = layer_map or LayerMap(source.layers, tuple(range(source.layers)))
    check_depth(path, modules, layer_map)
    if optimizer is not None:
        check_optimizer(path, optimizer, shapes, metadata)
    metadata = ensure_metadata_has_dp_cp_group({**metadata, "non_homogeneous_layers": not source.homogeneous})
    contents = _aimed(modules, layer_map, source, metadata)
    if optimizer is not None:
        contents["optimizer"] = optimizer_state_dict(optimizer, dict(contents), metadata, loading=True)
    check_tensors(path, contents, shapes)
    if with_rng:
        contents[_RNG] = _sharded_rng()
    with readable(path):
        # Whether each byte has one main reader is a saver's question; a map may leave source layers unread.
        loaded = dist_checkpointing.load(contents, str(path), validate_access_integrity=False)
    for key, module in zip(_chunk_keys(modules), modules, strict=True):
        module.load_state_dict(loaded[key], strict=True)
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])
    return loaded[_RNG] if with_rng else None


def _aimed(
    modules: list[nn.Module], layer_map: LayerMap, source: SourceDepth, metadata: dict
) -> dict[str, Any]:
    plain = layer_map.is_identity and not source.homogeneous
    return {
        key: module.sharded_state_dict(metadata=metadata)
        if plain
        else mapped_state_dict(module, layer_map, source, metadata)
        for key, module in zip(_chunk_keys(modules), modules, strict=True)
    }


def _contents(modules: list[nn.Module], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    contents: dict[str, Any] = {
        key: module.sharded_state_dict(metadata=metadata)
        for key, module in zip(_chunk_keys(modules), modules, strict=True)
    }
    if optimizer is not None:
        contents["optimizer"] = optimizer_state_dict(optimizer, dict(contents), metadata, loading=False)
    contents[_RNG] = _sharded_rng()
    return contents


def _chunk_keys(modules: list[nn.Module]) -> list[str]:
    """As Megatron-LM names them."""
    return ["model"] if len(modules) == 1 else [f"model{i}" for i in range(len(modules))]


def _unwrapped(chunk: nn.Module) -> nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_rng() -> ShardedObject:
    """This rank's generators: one cell of a grid over (pp, tp, dp), so only the same layout finds it
    again.
    """
    layout = _layout()
    return ShardedObject(
        _RNG,
        random_state.capture(),
        (layout["pp"], layout["tp"], layout["dp"]),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        ),
    )


def _layout() -> dict[str, int]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def _spell(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={layout.get(key)}" for key in ("tp", "pp", "vpp", "dp"))


def _bytes_to_write(contents: dict[str, Any]) -> int:
    mine = sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in sharded_tensors(contents)
        if is_main_replica(tensor.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64)
    dist.all_reduce(total, group=ranks.control_group())
    return int(total)


@contextmanager
def _own_results_queue() -> Iterator[None]:
    """Spares a synchronous save the manager process that Megatron spawns to collect results.

    That queue is made for asynchronous saves, where another process writes. Its start costs seconds and
    imports the main script again, which hangs scripts without a `__main__` guard.
    """
    kept = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = kept


def _on_main(action: Callable[[], None]) -> None:
    """Runs `action` on rank 0; when it raises, all ranks raise."""
    error = None
    if ranks.is_main():
        try:
            action()
        except Exception as raised:
            error = raised
    ranks.agree(error)
