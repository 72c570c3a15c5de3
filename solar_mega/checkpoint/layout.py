"""What saving and loading agree on: the form of a Megatron checkpoint, this rank's place in the layout."""

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from solar_mega.runtime import random_state

METADATA = {
    "non_homogeneous_layers": True,
    # Explicit: the default is a deprecated format, and only this one follows a layer map or another TP.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
RNG = "rng_state"


def model_entries(modules: list[nn.Module]) -> dict[str, nn.Module]:
    """The chunks of this rank, named as Megatron-LM names them."""
    if len(modules) == 1:
        return {"model": modules[0]}
    return {f"model{i}": module for i, module in enumerate(modules)}


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model inside DDP and whatever else holds one in `module`."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def rng_entry() -> dict[str, ShardedObject]:
    """This rank's generators: one cell of a grid over (pp, tp, dp), so only the same layout finds it
    again."""
    layout = current_layout()
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    grid = (layout["pp"], layout["tp"], layout["dp"])
    return {RNG: ShardedObject(RNG, random_state.capture(), grid, place)}


def replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights, and share the work of writing and reading them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def current_layout() -> dict[str, int]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def spell(layout: dict[str, Any]) -> str:
    return " ".join(f"{key}={layout.get(key)}" for key in ("tp", "pp", "vpp", "dp"))
