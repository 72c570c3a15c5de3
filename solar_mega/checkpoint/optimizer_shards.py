"""The distributed optimizer's states in checkpoints: each rank writes and reads the share it owns, in place.

A data-parallel rank owns a range of the flattened parameter. In the checkpoint a state has its parameter's
shape, so that any layout and layer map can read it, and a flat range of a row-major tensor is a few boxes:

    parameter [4, 6], flat range 3..15      . . . a a a       box [0:1, 3:6]
                                            b b b b b b       box [1:2, 0:6]
                                            c c c . . .       box [2:3, 0:3]
                                            . . . . . .

Megatron's own `fully_reshardable` code first gathers all states of the model-parallel rank onto every replica
(12 bytes a parameter, on each), and reads all of them back when loading. The files are the same.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of the boxes that make up elements start .. stop of a flattened tensor, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        whole = 0 if inside else (stop - start) // row
        if whole:
            yield (index, *(0 for _ in shape[1:])), (whole, *shape[1:])
            start += whole * row
            continue
        end = min(stop, (index + 1) * row)
        for offset, size in boxes(shape[1:], inside, end - index * row):
            yield (index, *offset), (1, *size)
        start = end


def sharded_states(
    optimizer: DistributedOptimizer, model_state: dict[str, Any]
) -> dict[int, dict[str, list]]:
    """{parameter's number: {state: its boxes}} of this rank, over views of the optimizer's own tensors.

    `model_state` is the model's sharded state dict, plain or aimed through a layer map.
    """
    described = {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    numbers = {p: n for n, p in enumerate(p for b in optimizer.buffers for p in b.param_index_map)}
    shares: dict[int, dict[str, list]] = {}
    for parameter, share in _shares(optimizer):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        shares[numbers[parameter]] = {
            name: _share_of(described[parameter], parameter, states[name], share.start, share.end, name)
            for name in STATES
        }
    return shares


def fill_states(optimizer: DistributedOptimizer, loaded: dict[int, dict[str, list[Tensor]]]) -> None:
    """The loaded boxes into the optimizer's tensors; they lie there already unless a loader made its own.
    Master weights that are the weights themselves may be left out."""
    numbers = {p: n for n, p in enumerate(p for b in optimizer.buffers for p in b.param_index_map)}
    for parameter, _ in _shares(optimizer):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name in STATES:
            flat, done = states[name].detach().view(-1), 0
            for piece in loaded[numbers[parameter]].get(name, ()):
                place = flat[done : done + piece.numel()]
                if place.data_ptr() != piece.data_ptr():
                    place.copy_(piece.reshape(-1))
                done += piece.numel()


def _shares(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(parameter, this rank's range of it flattened) of every parameter that this rank has a part of."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _share_of(
    entry: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    state: Tensor,
    start: int,
    stop: int,
    name: str,
) -> list[ShardedTensor]:
    """Elements start .. stop of the parameter, which `state` [stop - start] holds, as boxes of the global
    tensor."""
    flat = state.detach().view(-1)
    found = []
    for part in _parts(entry):
        if not part.data.is_contiguous() or part.data.untyped_storage().data_ptr() != (
            parameter.untyped_storage().data_ptr()
        ):
            raise TypeError(f"{part.key}: a checkpoint entry that is no view of its parameter")
        begin = part.data.storage_offset() - parameter.storage_offset()
        low, high = max(start, begin), min(stop, begin + part.data.numel())
        # Axes that exist in the checkpoint only (stacked layers) lead the global shape.
        shape = part.local_shape
        taken = low - start
        for offset, size in boxes(shape, low - begin, high - begin):
            count = math.prod(size)
            lead = part.prepend_axis_num
            origin = part.global_offset[lead:]
            found.append(
                replace(
                    part,
                    key=f"optimizer.state.{name}.{part.key}",
                    data=flat[taken : taken + count].view(size),
                    dtype=state.dtype,
                    local_shape=tuple(size),
                    global_offset=(
                        *part.global_offset[:lead],
                        *(a + b for a, b in zip(origin, offset, strict=True)),
                    ),
                    axis_fragmentations=None,
                    # One owner among the replicas; the copies of other axes (tensor-parallel norms, tied
                    # embeddings) stay copies.
                    replica_id=(*part.replica_id[:-1], 0),
                )
            )
            taken += count
    return found


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[ShardedTensor]:
    """The tensors an entry stands for: itself, or what its factory makes (gate and up of a fused matrix)."""
    if isinstance(entry, ShardedTensorFactory):
        yield from (part for part in nested_values({"": entry.build()}) if isinstance(part, ShardedTensor))
    else:
        yield entry
