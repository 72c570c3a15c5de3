"""SwiGLU, the gated activation of Llama's feed-forward layer, in one pass.

    [g | u] = halves of a row of x
    y  = g · σ(g) · u                                     σ(g) = 1 / (1 + e^−g)
    dg = dy · u · σ(g) · (1 + g · (1 − σ(g))),   du = dy · g · σ(g)

Shapes: x, dx [..., 2 · width] as Megatron's gated projection gives it (per tensor-parallel rank its part of g
beside its part of u); y, dy [..., width]. Arithmetic is fp32, outputs are rounded once; only x is saved.
Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), eq. 6.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library
from solar_mega.ops.rms_norm import Implementation, _rows

# ---------------------------------------------------------------------------------------------- reference


def swiglu_reference(x: Tensor) -> Tensor:
    """The formula in PyTorch: fp32 arithmetic (fp64 for fp64), rounded once; any device and strides."""
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise RuntimeError(f"swiglu: x has shape {list(x.shape)}; allowed: [..., 2 * width] with width >= 1")
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


# ---------------------------------------------------------------------------------------------- op

if library.available():
    _forward = torch.ops.solar_mega.swiglu.default
    _backward = torch.ops.solar_mega.swiglu_backward.default

    @torch.library.register_fake("solar_mega::swiglu")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @torch.library.register_fake("solar_mega::swiglu_backward")
    def _(dy: Tensor, x: Tensor) -> Tensor:
        return x.new_empty(x.shape)


# ---------------------------------------------------------------------------------------------- autograd
#
# Twice, as in rms_norm.py: for torch.ops and torch.compile, and a lean one for eager mode.


@once_differentiable
def _swiglu_backward(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return _backward(_rows(dy), x)


def _setup_swiglu(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


if library.available():
    torch.library.register_autograd("solar_mega::swiglu", _swiglu_backward, setup_context=_setup_swiglu)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(x)

    backward = staticmethod(_swiglu_backward)


# ---------------------------------------------------------------------------------------------- public


def swiglu(x: Tensor, *, implementation: Implementation = "fused") -> Tensor:
    """x [..., 2 · width] = [g | u] -> silu(g) · u [..., width], contiguous; differentiable once.

    x is float32, bfloat16 or float16; its last stride is 1 and its leading dimensions fold into two strides.

    Raises RuntimeError for a wrong dtype, shape or stride, ValueError for an unknown implementation.
    """
    if not library.use_compiled(implementation, x.device.type):
        return swiglu_reference(x)
    if torch.compiler.is_compiling():
        return _forward(x)
    return _Swiglu.apply(x)
