"""Weighted sums of models' weights, the arithmetic of merging by average and SLERP, in one pass.

    y = sum_i w_i x_i                              or, with a base:   y = base + sum_i w_i (x_i - base)

Shapes: x_i, base, y [elements]; w_i numbers. Sums are fp32, whatever the inputs are stored in, and are
rounded once to what y is stored in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from solar_mega.ops import library
from solar_mega.ops.rms_norm import Implementation

# ---------------------------------------------------------------------------------------------- reference


def weighted_sum_reference(
    inputs: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """The formula in PyTorch, unrounded: fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    origin = None if base is None else base.to(wide)
    total = torch.zeros_like(inputs[0], dtype=wide)
    for stored, weight in zip(inputs, weights, strict=True):
        x = stored.to(wide)
        total.add_(x if origin is None else x - origin, alpha=weight)
    return total if origin is None else total.add_(origin)


# ---------------------------------------------------------------------------------------------- op

if library.available():

    @torch.library.register_fake("solar_mega::weighted_sum_out")
    def _(inputs: list[Tensor], weights: list[float], base: Tensor | None, out: Tensor) -> bool:
        return True


# ---------------------------------------------------------------------------------------------- public


def weighted_sum(
    inputs: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    out: Tensor,
    implementation: Implementation = "fused",
) -> bool:
    """Writes y to `out` [elements] and tells whether every element is finite there.

    inputs and base [elements] have one dtype, `out` has any; float32, bfloat16 or float16, on the CPU,
    contiguous. Runs on the calling thread.

    Raises RuntimeError for a wrong number, dtype, shape, stride or device, ValueError for an unknown
    implementation.
    """
    if library.use_compiled(implementation, "cpu"):
        return torch.ops.solar_mega.weighted_sum_out.default(inputs, weights, base, out)
    out.copy_(weighted_sum_reference(inputs, weights, base))
    return bool(torch.isfinite(out).all())
