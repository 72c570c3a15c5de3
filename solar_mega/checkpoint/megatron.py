"""Megatron distributed checkpoints: saved from any layout, loaded on any other, through a layer map.

The files are stock `megatron.core.dist_checkpointing` (torch_dist): one tensor per layer and parameter,
optimizer states in the shape of their parameters (`fully_reshardable`), random generators per rank; beside
them `run_state.json`. All functions here are collective: every rank calls them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn

from solar_mega.checkpoint.changed_layers import ChangedLayers, plain_maps
from solar_mega.checkpoint.fit import check_depth, check_optimizer, check_tensors, readable
from solar_mega.checkpoint.index import read_index
from solar_mega.checkpoint.layout import (
    METADATA,
    RNG,
    current_layout,
    model_entries,
    replicas,
    rng_entry,
    spell,
    unwrapped,
)
from solar_mega.checkpoint.optimizer_kinds import ask_as, kind_of, nest_as, optimizer_kind
from solar_mega.checkpoint.optimizer_state import load_optimizer_state, optimizer_state_dict
from solar_mega.checkpoint.remap import SourceDepth, mapped_state_dict
from solar_mega.checkpoint.run_state import RunState, check_files, describe_megatron, read_run_state
from solar_mega.checkpoint.saver import save_checkpoint
from solar_mega.depth.layer_map import LayerMap
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime import random_state
from solar_mega.runtime.console import say

__all__ = [
    "RunState",
    "describe_megatron",
    "load_checkpoint",
    "load_tensors",
    "read_run_state",
    "save_checkpoint",
]


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
            alike; `changed_layers` says what becomes of the states of layers that are more than copies. None
            resumes: the depth must agree, and the random generators are restored on the same layout, or
            seeded anew from (seed, step), with a message, on another.

    Raises UserError when files are missing or damaged, or the checkpoint does not hold what the model needs.
    """
    path = Path(path)
    ranks.on_main(lambda: check_files(path))
    state = read_run_state(path)
    same_layout = state.parallel.items() >= current_layout().items()
    resume = layer_map is None
    rng = _load(path, chunks, optimizer, layer_map, with_rng=resume and same_layout)
    if rng is not None:
        random_state.restore(rng)
    elif resume:
        random_state.reseed(state.seed, state.step)
        say(
            f"{path.name} was saved on {spell(state.parallel)} and is loaded on {spell(current_layout())}: "
            f"random streams are seeded anew from seed {state.seed} and step {state.step}; weights, "
            "optimizer and data position are exact"
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
    modules = [unwrapped(chunk) for chunk in chunks]
    # Megatron unpickles the index as it is; nobody's code may run from there.
    ranks.on_main(lambda: read_index(path) and None)
    with readable(path):
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        shapes = {key: tuple(tensor.global_shape) for key, tensor in stored.items()}
        metadata = {**METADATA, **(dist_checkpointing.load_content_metadata(str(path)) or {})}
    source = SourceDepth.of(shapes)
    layer_map = layer_map or LayerMap(source.layers, tuple(range(source.layers)))
    check_depth(path, modules, layer_map)
    if optimizer is not None:
        check_optimizer(path, optimizer, stored, metadata)
    metadata = ensure_metadata_has_dp_cp_group({**metadata, "non_homogeneous_layers": not source.homogeneous})
    if not layer_map.changed:
        return _load_copies(path, modules, optimizer, layer_map, source, shapes, metadata, with_rng)
    dtypes = {tensor.dtype for key, tensor in stored.items() if key.startswith("decoder.layers.")}
    changed = ChangedLayers(modules, optimizer, layer_map, max(dtypes, key=lambda dtype: dtype.itemsize))
    try:
        for number, copies in enumerate(plain_maps(layer_map)):
            _load_copies(path, modules, optimizer, copies, source, shapes, metadata, with_rng=False)
            changed.keep(number)
    except BaseException:
        changed.release()
        raise
    changed.finish()
    return None


def _load_copies(
    path: Path,
    modules: list[nn.Module],
    optimizer: MegatronOptimizer | None,
    layer_map: LayerMap,
    source: SourceDepth,
    shapes: dict[str, tuple[int, ...]],
    metadata: dict[str, Any],
    with_rng: bool,
) -> dict[str, Any] | None:
    """`_load` through a map whose layers are copies."""
    contents = _aimed(modules, layer_map, source, metadata)
    if optimizer is not None:
        own = optimizer_state_dict(optimizer, dict(contents), metadata, loading=True)
        saved, needed = optimizer_kind(shapes), kind_of(optimizer)
        contents["optimizer"] = ask_as(own, saved, needed)
    check_tensors(path, contents, shapes)
    if with_rng:
        contents.update(rng_entry())
    with readable(path):
        # Whether each byte has one main reader is a saver's question; a map may leave source layers unread.
        loaded = dist_checkpointing.load(
            contents, str(path), _strategy(path, layer_map), validate_access_integrity=False
        )
    for key, module in model_entries(modules).items():
        module.load_state_dict(loaded[key], strict=True)
    if optimizer is not None:
        states = loaded["optimizer"]
        load_optimizer_state(optimizer, states if saved == needed else nest_as(states, own, optimizer))
    return loaded[RNG] if with_rng else None


def _strategy(path: Path, layer_map: LayerMap) -> LoadShardedStrategy:
    """Replicas read a part each and exchange them, where each wants a piece once; a layer map may want it for
    several layers of one rank."""
    strategy = get_default_load_sharded_strategy(str(path))
    if layer_map.is_identity and replicas().size() > 1:
        return FullyParallelLoadStrategyWrapper(strategy, replicas())
    return strategy


def _aimed(
    modules: list[nn.Module], layer_map: LayerMap, source: SourceDepth, metadata: dict
) -> dict[str, Any]:
    plain = layer_map.is_identity and not source.homogeneous
    return {
        key: module.sharded_state_dict(metadata=metadata)
        if plain
        else mapped_state_dict(module, layer_map, source, metadata)
        for key, module in model_entries(modules).items()
    }
