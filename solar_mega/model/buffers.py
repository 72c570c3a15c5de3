"""Sizes of Megatron's gradient and parameter buffers, and each data-parallel rank's share of the optimizer.

Weights lie in their buffer in reverse order, cut into buckets. The distributed optimizer gives every
data-parallel rank an equal slice of each bucket:

    | w7 w6 w5 .. | w4 w3 ... pad |        bucket 0, bucket 1
    | r0 | r1 | r2 | r3 | r0 | ...         slices; a rank keeps fp32 master weights and moments of its slices
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from solar_mega.config.schema import ParallelConfig
from solar_mega.model.parameters import Weight

_ALIGNMENT = 64
"""Elements to which Megatron aligns the start of a weight."""

_BUCKET_ALIGNMENT = 128


_BUCKET, _BUCKET_OF_REPLICA = 40_000_000, 1_000_000
"""Megatron's default size of a bucket: in all at least, and for each replica."""


def bucket_size(parallel: ParallelConfig, dp: int) -> int | None:
    """Elements after which a bucket of the first stage's first chunk is closed; None for a single one."""
    if not parallel.overlap_grad_reduce or dp == 1:
        return None
    return parallel.bucket_size or max(_BUCKET, _BUCKET_OF_REPLICA * dp)


@dataclass(frozen=True)
class Buffer:
    """The contiguous buffer of one model chunk."""

    elements: int
    """Padding included."""

    shares: tuple[int, ...]
    """Elements of weights, padding left out, whose optimizer state each data-parallel rank holds."""


def buffer(weights: Sequence[Weight], dp: int, distributed: bool, bucket_size: int | None = None) -> Buffer:
    """The buffer of one chunk's weights.

    Args:
        dp: data-parallel ranks.
        distributed: with the distributed optimizer, which pads; without it every rank has all states.
        bucket_size: elements after which a bucket is closed; None for one bucket.
    """
    total = sum(weight.elements for weight in weights)
    if not distributed:
        return Buffer(total, (total,) * dp)
    spans: list[tuple[int, int]] = []
    shares = [0] * dp
    bucket_start = position = 0

    def close(end: int) -> int:
        nonlocal spans, bucket_start
        end = _up(end, math.lcm(dp, _BUCKET_ALIGNMENT))
        _deal(spans, bucket_start, (end - bucket_start) // dp, shares)
        spans, bucket_start = [], end
        return end

    for weight in reversed(weights):
        position = _up(position, _ALIGNMENT)
        if weight.shared and spans:
            position = close(position)
        spans.append((position, position + weight.elements))
        position += weight.elements
        full = bucket_size is not None and position - bucket_start >= bucket_size
        if full or weight.shared:
            position = close(position)
    return Buffer(close(position) if spans else position, tuple(shares))


def _deal(spans: Sequence[tuple[int, int]], start: int, slice_size: int, shares: list[int]) -> None:
    """Adds to each rank's share what of the weights' `spans` falls into its slice of the bucket."""
    for begin, end in spans:
        for rank in range((begin - start) // slice_size, (end - 1 - start) // slice_size + 1):
            low, high = start + rank * slice_size, start + (rank + 1) * slice_size
            shares[rank] += min(end, high) - max(begin, low)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
