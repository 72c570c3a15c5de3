"""Dot products of two models' weights, from which SLERP has its angle, in one pass.

    (a.a, b.b, a.b)                                 or, with a base:   a - base, b - base instead of a, b

Shapes: a, b, base [elements]; result [3], fp64. Products are fp32, sums fp32 over 1024 elements and fp64 over
these.
"""

import torch
from torch import Tensor

from solar_mega.ops import library
from solar_mega.ops.rms_norm import Implementation

# ---------------------------------------------------------------------------------------------- reference


def dot_products_reference(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """The formula in PyTorch, in fp64."""
    origin = 0.0 if base is None else base.double()
    a, b = a.double() - origin, b.double() - origin
    return torch.stack((a.dot(a), b.dot(b), a.dot(b)))


# ---------------------------------------------------------------------------------------------- op

if library.available():

    @torch.library.register_fake("solar_mega::dot_products")
    def _(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        return a.new_empty(3, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- public


def dot_products(
    a: Tensor, b: Tensor, base: Tensor | None = None, *, implementation: Implementation = "fused"
) -> Tensor:
    """a, b [elements] -> (a.a, b.b, a.b), fp64 [3].

    a, b and base have one dtype, float32, bfloat16 or float16, on the CPU, contiguous. Runs on the calling
    thread.

    Raises RuntimeError for a wrong dtype, shape, stride or device, ValueError for an unknown implementation.
    """
    if library.use_compiled(implementation, "cpu"):
        return torch.ops.solar_mega.dot_products.default(a, b, base)
    return dot_products_reference(a, b, base)
