"""Optimizer states in Megatron checkpoints, around faults of megatron-core 0.16 without TE or apex.

It then uses torch's AdamW, which counts its steps in a tensor per parameter, while Megatron stores one
number:

1. An optimizer that has not stepped has no states, and Megatron asserts that it has: give it zeros at step 0.
   (Megatron's own remedy, a step on zero gradients, decays the weights.)
2. Loading hands one and the same step tensor to every parameter. AdamW then adds 1 to it once per parameter,
   and the bias correction of a resumed run is wrong: each gets its own copy.

The distributed optimizer's states go their own way, without a gather: see `optimizer_shards`.

Besides, Megatron loads the learning rate, betas and decay of the old run over those of the new
configuration. Here the configuration wins.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from solar_mega.checkpoint.optimizer_shards import fill_states, sharded_states
from solar_mega.runtime.garbage import small_heap


def optimizer_state_dict(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], loading: bool
) -> dict[str, Any]:
    """`optimizer.sharded_state_dict`, whether or not the optimizer has stepped."""
    for inner in _inner(optimizer):
        _give_states(inner)
    with _in_place(optimizer), small_heap():  # Megatron collects garbage when it describes its states
        return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, moments, master weights and step count exact, hyperparameters kept."""
    optimizers = list(_inner(optimizer))
    kept = [[_hyperparameters(group) for group in inner.optimizer.param_groups] for inner in optimizers]
    with _in_place(optimizer):
        optimizer.load_state_dict(loaded)
    for inner, groups in zip(optimizers, kept, strict=True):
        for group, hyperparameters in zip(inner.optimizer.param_groups, groups, strict=True):
            parameters, steps = group["params"], group.get("step")
            group.clear()
            group.update(params=parameters, **hyperparameters)
            if steps is not None and not isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW):
                group["step"] = steps  # where Transformer Engine's and apex's Adam count
        for state in inner.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


@contextmanager
def _in_place(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Megatron's distributed optimizers describe and take their states as `optimizer_shards` does."""
    distributed = [inner for inner in _inner(optimizer) if isinstance(inner, DistributedOptimizer)]
    for inner in distributed:
        inner.sharded_param_state_fully_reshardable = partial(_describe, inner)
        inner.load_parameter_state_from_fully_reshardable = partial(fill_states, inner)
    try:
        yield
    finally:
        for inner in distributed:
            del inner.sharded_param_state_fully_reshardable
            del inner.load_parameter_state_from_fully_reshardable


def _describe(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool, metadata: dict | None
) -> dict:
    return sharded_states(optimizer, model_state)


def states_of(optimizer: MegatronOptimizer, parameter: torch.Tensor) -> tuple[dict[str, torch.Tensor], slice]:
    """What this rank's optimizer holds for a model parameter, and which elements of the flattened parameter
    it is for: `exp_avg`, `exp_avg_sq`, and `master` where the fp32 master weights are not the parameter
    itself.

    Nothing, where another data-parallel rank holds all of it or the parameter is frozen.
    """
    whole = slice(0, parameter.numel())
    for inner in _inner(optimizer):
        if isinstance(inner, DistributedOptimizer):
            if parameter not in inner.model_param_group_index_map:
                continue
            held = inner._get_main_param_and_optimizer_states(parameter)
            share = inner._get_model_param_range_map(parameter)["param"]
            main, part = held["param"], slice(share.start, share.end)
        else:
            main, part = getattr(parameter, "main_param", parameter), whole
            held = inner.optimizer.state.get(main) if inner.optimizer is not None else None
            if not held:
                continue
        states = {key: held[key] for key in ("exp_avg", "exp_avg_sq")}
        if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            states["master"] = main
        return states, part
    return {}, whole


def _inner(optimizer: MegatronOptimizer) -> Iterable[MegatronOptimizer]:
    return iter(getattr(optimizer, "chained_optimizers", [optimizer]))


def _give_states(optimizer: MegatronOptimizer) -> None:
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        if optimizer.init_state_fn is not None:
            optimizer.init_state_fn(inner, optimizer.config)
        return
    for group in inner.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if inner.state[parameter]:
                continue
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else None),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
