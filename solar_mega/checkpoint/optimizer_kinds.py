"""Optimizer states written by one of Megatron's optimizers, read by another: `parallel.distributed_optimizer`
may change at a resume.

All of them keep moments in the shape of their parameters, `optimizer.state.exp_avg.<weight>`; they differ in
where the fp32 master weights are and in what the states are nested:

    distributed  optimizer.state.param.<weight>       {optimizer: {param_groups}, param_state}
    float16      optimizer.state.fp32_param.<weight>  {optimizer: {param_groups, state},
                                                      fp32_from_fp16_params}
    fp32         the weights themselves               {param_groups, state}
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

_MASTER = {"distributed": "optimizer.state.param.", "float16": "optimizer.state.fp32_param."}


def optimizer_kind(keys: Iterable[str]) -> str | None:
    """Which optimizer wrote a checkpoint with these tensors: "distributed", "float16", "fp32" or None."""
    states = {key.split(".")[2] for key in keys if key.startswith("optimizer.state.")}
    if not states:
        return None
    return "distributed" if "param" in states else "float16" if "fp32_param" in states else "fp32"


def kind_of(optimizer: MegatronOptimizer) -> str:
    """The same word for an optimizer at hand."""
    names = {"DistributedOptimizer": "distributed", "FP32Optimizer": "fp32"}
    return names.get(type(_first(optimizer)).__name__, "float16")


def ask_as(asked: dict[str, Any], saved: str, needed: str) -> dict[str, Any]:
    """A sharded state dict of the optimizer at hand, its master weights under the name that the `saved` kind
    wrote them by. Those that are the weights themselves are not asked for twice."""
    if saved == needed or needed == "fp32":
        return asked
    if saved == "fp32":  # so are those at hand, as a view
        states = asked["param_state"]
        shares = {
            number: {k: v for k, v in state.items() if k != "param"} for number, state in states.items()
        }
        return {**asked, "param_state": shares}
    for entry in nested_values(asked):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            entry.key = entry.key.replace(_MASTER[needed], _MASTER[saved], 1)
    return asked


def nest_as(loaded: dict[str, Any], asked: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What was loaded for `asked`, as the optimizer at hand takes it.

    Args:
        loaded: tensors nested as in `asked`, among what the kind that saved had beside tensors.
        asked: as `optimizer_state_dict` gave it, with this optimizer's parameter groups.
    """
    needed, step = kind_of(optimizer), _step(loaded)
    inside = asked if needed == "fp32" else asked["optimizer"]
    groups = [{**_unwrapped(group), "step": step} for group in inside["param_groups"]]
    if needed == "distributed":
        return {
            "optimizer": {"param_groups": groups},
            "param_state": loaded["param_state"],
            "param_state_sharding_type": asked["param_state_sharding_type"],
        }
    source = loaded if needed == "fp32" else loaded["optimizer"]
    states = {number: source["state"][number] for number in inside["state"] if isinstance(number, int)}
    if isinstance(_first(optimizer).optimizer, torch.optim.Adam | torch.optim.AdamW):
        states["common_step"] = torch.tensor(float(step))
    nested = {"state": states, "param_groups": groups}
    if needed == "fp32":
        return nested
    return {**asked, "optimizer": nested, "fp32_from_fp16_params": loaded["fp32_from_fp16_params"]}


def _unwrapped(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v for k, v in group.items()}


def _step(loaded: dict[str, Any]) -> int:
    """Optimizer steps done, wherever the kind that saved keeps their number."""
    inside = loaded.get("optimizer", loaded)
    common = inside.get("state", {}).get("common_step")
    if common is None:
        common = next((group["step"] for group in inside["param_groups"] if "step" in group), 0)
    return int(common)


def _first(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    return getattr(optimizer, "chained_optimizers", [optimizer])[0]
