"""Megatron distributed checkpoints: saved from any layout, loaded on any other, through a layer map if need be.

The files are stock `megatron.core.dist_checkpointing` (torch_dist), one tensor per layer and parameter, optimizer
states in the shape of their parameters (`fully_reshardable`), random generators per rank; beside them
`run_state.json`. All functions here are collective: every rank calls them.
"""

import errno
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from solar_mega.checkpoint.optimizer_state import kind_of, load_optimizer_state, optimizer_kind, optimizer_state_dict
from solar_mega.checkpoint.remap import SourceDepth, mapped_state_dict
from solar_mega.checkpoint.run_state import RunState, check_files, describe_megatron, read_run_state, write_run_state
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime import random_state
from solar_mega.runtime.console import say
from solar_mega.runtime.files import DISK_ERRORS, require_space

__all__ = ["RunState", "describe_megatron", "load_checkpoint", "load_tensors", "read_run_state", "save_checkpoint"]

_METADATA = {
    "non_homogeneous_layers": True,
    # Explicit: its default is a deprecated format, and of all formats only this one follows a layer map or a new TP.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
_RNG = "rng_state"
_SHOWN = 12


def save_checkpoint(
    store: CheckpointStore, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, state: RunState
) -> Path:
    """Saves this run at `state.step` and commits it; older checkpoints are pruned afterwards.

    Args:
        chunks: the model's chunks of this rank, plain or under DDP.
        optimizer: None saves weights only; such a checkpoint can be loaded, not resumed.
        state: its `parallel` is completed with the layout at hand.

    Returns the checkpoint's directory. Raises UserError when the disk is full or a file cannot be written; the
    unfinished checkpoint is then removed, and older ones and `latest` are as before.
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
        # A failed write is broadcast by Megatron, so all ranks are here; other failures end this process and the
        # launcher ends the rest. Either way nothing collective may follow.
        if ranks.is_main():
            store.discard(state.step)
        raise UserError(_save_failure(store.path(state.step), error)) from error

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
        optimizer: None loads weights only. An optimizer that was built before and keeps master weights then needs
            `optimizer.reload_model_params()`.
        layer_map: grows the model: target layer -> the checkpoint's layer, weights and optimizer states alike.
            None resumes: the depth must agree, and the random generators are restored on the same layout, or
            seeded anew from (seed, step), with a message, on another.

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
            f"{path.name} was saved on {_spell(state.parallel)} and is loaded on {_spell(_layout())}: random streams are "
            f"seeded anew from seed {state.seed} and step {state.step}; weights, optimizer and data position are exact"
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
    with _readable(path):
        shapes = {k: tuple(t.global_shape) for k, t in dist_checkpointing.load_tensors_metadata(str(path)).items()}
        metadata = {**_METADATA, **(dist_checkpointing.load_content_metadata(str(path)) or {})}
    source = SourceDepth.of(shapes)
    layer_map = layer_map or LayerMap(source.layers, tuple(range(source.layers)))
    _check_depth(path, modules, layer_map)
    if optimizer is not None:
        _check_optimizer(path, optimizer, shapes, metadata)
    metadata = ensure_metadata_has_dp_cp_group({**metadata, "non_homogeneous_layers": not source.homogeneous})
    contents = _aimed(modules, layer_map, source, metadata)
    if optimizer is not None:
        contents["optimizer"] = optimizer_state_dict(optimizer, dict(contents), metadata, loading=True)
    _check_tensors(path, contents, shapes)
    if with_rng:
        contents[_RNG] = _sharded_rng()
    with _readable(path):
        # Whether each byte has one main reader is a question for savers; a map may leave source layers unread.
        loaded = dist_checkpointing.load(contents, str(path), validate_access_integrity=False)
    for key, module in zip(_chunk_keys(modules), modules, strict=True):
        module.load_state_dict(loaded[key], strict=True)
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])
    return loaded[_RNG] if with_rng else None


def _aimed(modules: list[nn.Module], layer_map: LayerMap, source: SourceDepth, metadata: dict) -> dict[str, Any]:
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
    """This rank's generators: one cell of a grid over (pp, tp, dp), so that only the same layout finds it again."""
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


def _sharded_tensors(contents: dict[str, Any]) -> Iterator[ShardedTensor]:
    for entry in nested_values(contents):
        if isinstance(entry, ShardedTensorFactory):
            yield from (part for part in nested_values({"": entry.build()}) if isinstance(part, ShardedTensor))
        elif isinstance(entry, ShardedTensor):
            yield entry


def _bytes_to_write(contents: dict[str, Any]) -> int:
    mine = sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in _sharded_tensors(contents)
        if is_main_replica(tensor.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64)
    dist.all_reduce(total, group=ranks.control_group())
    return int(total)


@contextmanager
def _own_results_queue() -> Iterator[None]:
    """Spares a synchronous save the manager process that Megatron spawns to collect results.

    That queue is made for asynchronous saves, where another process writes. Its start costs seconds and imports the
    main script again, which hangs scripts without a `__main__` guard.
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


def _save_failure(path: Path, error: BaseException) -> str:
    causes = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    reason = str(causes[0]) if causes else "rank 0 tells why"
    for cause in [c for cause in causes for c in (cause, cause.__cause__)]:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            reason = f"{DISK_ERRORS[cause.errno]} ({cause})"
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if f"[Errno {code}]" in reason and DISK_ERRORS[code] not in reason:
            reason = f"{DISK_ERRORS[code]} ({reason})"
    return f"saving {path} failed: {reason}; the unfinished checkpoint was removed, older ones are untouched"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what Megatron, torch and pickle raise about a damaged checkpoint into a UserError naming it."""
    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ not in ("UnpicklingError", "AttributeError", "ModuleNotFoundError"):
            raise
        raise UserError(f"checkpoint {path} is damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:400]


def _check_depth(path: Path, modules: list[nn.Module], layer_map: LayerMap) -> None:
    layers = modules[0].config.num_layers
    if len(layer_map) != layers:
        raise UserError(
            f"checkpoint {path} gives {len(layer_map)} layers through layer map \"{layer_map}\"; the model has {layers}"
        )


def _check_optimizer(path: Path, optimizer: MegatronOptimizer, shapes: dict[str, Any], metadata: dict) -> None:
    saved, needed = optimizer_kind(shapes), kind_of(optimizer)
    sharding = metadata["distrib_optim_sharding_type"]
    if saved is None:
        raise UserError(f"checkpoint {path} holds weights only; a run cannot resume from it without optimizer states")
    if sharding != "fully_reshardable":
        raise UserError(f"checkpoint {path} has optimizer states of type {sharding}; supported: fully_reshardable")
    if saved != needed:
        raise UserError(
            f"checkpoint {path} was written by the {saved} optimizer, this run uses the {needed} one; set "
            "parallel.distributed_optimizer and train.precision as they were"
        )


def _check_tensors(path: Path, contents: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    problems = Problems()
    for tensor in {tensor.key: tensor for tensor in _sharded_tensors(contents)}.values():
        held = shapes.get(tensor.key)
        if held is None:
            problems.add(f"{tensor.key} is missing")
        elif held != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            problems.add(f"{tensor.key} has shape {list(held)}; the model needs {list(tensor.global_shape)}")
    if len(problems.texts) > _SHOWN:
        problems.texts[_SHOWN:] = [f"... and {len(problems.texts) - _SHOWN} more"]
    problems.raise_if_any(f"checkpoint {path} does not fit the model")
