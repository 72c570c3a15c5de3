"""RMSNorm, alone and with the residual add before it.

    rstd = 1 / sqrt(mean(x²) + eps)              one per row, fp32
    y    = x · rstd · g                          g = weight, or 1 + weight when zero_centered
    add:   x = round(x + residual), returned as the new residual

    backward, with u = dy · g and the mean over the row:
    dx      = rstd · u − x · rstd³ · mean(u · x)  [+ dresidual, the gradient of the new residual]
    dweight = Σ over rows of dy · x · rstd

Shapes: x, residual, y, dy, dx [..., hidden]; weight, dweight [hidden]; rstd [...]. Megatron's are [s, b, h].
Statistics and sums are fp32 for bf16, fp16 and fp32 tensors alike, every output is rounded once. Only rstd is
saved besides the inputs. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv
1910.07467), eq. 4.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library

# ---------------------------------------------------------------------------------------------- reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """The formula in PyTorch: fp32 arithmetic (fp64 for fp64), rounded once; any device and strides."""
    _check_reference(x, weight, None)
    wide = torch.promote_types(x.dtype, torch.float32)
    xw, gain = x.to(wide), weight.to(wide)
    if zero_centered:
        gain = gain + 1
    rstd = torch.rsqrt(xw.square().mean(-1, keepdim=True) + eps)
    return (xw * rstd * gain).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_reference` of x + residual, returned with that sum."""
    _check_reference(x, weight, residual)
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps, zero_centered), new_residual


def _check_reference(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    # The compiled ops check the same in C++ (csrc/common/rms_norm.h); here broadcasting would hide mistakes.
    if not x.is_floating_point():
        raise RuntimeError(f"rms_norm: x has dtype {x.dtype}; allowed: a floating-point dtype")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise RuntimeError(f"rms_norm: x has shape {list(x.shape)}; allowed: [..., hidden] with hidden >= 1")
    if weight.shape != x.shape[-1:]:
        raise RuntimeError(f"rms_norm: weight has shape {list(weight.shape)}; it must be [{x.shape[-1]}]")
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            got, wanted = f"{tensor.dtype} on {tensor.device}", f"{x.dtype} on {x.device}"
            raise RuntimeError(f"rms_norm: {name} is {got}; it must be {wanted}, as x")
    if residual is not None and residual.shape != x.shape:
        raise RuntimeError(
            f"rms_norm: residual has shape {list(residual.shape)}; it must be {list(x.shape)}, the shape of x"
        )


# ---------------------------------------------------------------------------------------------- op

if library.available():
    _forward = torch.ops.solar_mega.rms_norm.default
    _add_forward = torch.ops.solar_mega.add_rms_norm.default
    _backward = torch.ops.solar_mega.rms_norm_backward.default

    @torch.library.register_fake("solar_mega::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)

    @torch.library.register_fake("solar_mega::add_rms_norm")
    def _(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        return x.new_empty(x.shape), x.new_empty(x.shape), rstd

    @torch.library.register_fake("solar_mega::rms_norm_backward")
    def _(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        dresidual: Tensor | None = None,
        zero_centered: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)


# ---------------------------------------------------------------------------------------------- autograd
#
# Twice, over the same two backward functions. `register_autograd` makes the op itself differentiable, for
# whoever calls torch.ops and for torch.compile. In eager mode its generic wrapper costs more than a small
# norm: forward and backward of a 4×64 tensor took 60 µs through it, 42 µs through the `autograd.Function`s
# below, which dispatch beneath the autograd key, and 79 µs as torch.nn.functional.rms_norm.


def _rows(grad: Tensor) -> Tensor:
    """A gradient in strides the kernels take (a sum's gradient is an expanded scalar, for instance)."""
    return grad if grad.dim() <= 3 and grad.stride(-1) == 1 else grad.contiguous()


@once_differentiable
def _rms_norm_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _backward(_rows(dy), x, weight, rstd, None, ctx.zero_centered)
    return dx, dweight, None, None


@once_differentiable
def _add_rms_norm_backward(
    ctx: Any, dy: Tensor | None, dresidual: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dresidual, dresidual, None, None, None
    total, weight, rstd = ctx.saved_tensors
    into = None if dresidual is None else _rows(dresidual)
    dx, dweight = _backward(_rows(dy), total, weight, rstd, into, ctx.zero_centered)
    return dx, dx, dweight, None, None


def _setup_rms_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _setup_add_rms_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


if library.available():
    torch.library.register_autograd("solar_mega::rms_norm", _rms_norm_backward, setup_context=_setup_rms_norm)
    torch.library.register_autograd(
        "solar_mega::add_rms_norm", _add_rms_norm_backward, setup_context=_setup_add_rms_norm
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = _forward(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return y

    backward = staticmethod(_rms_norm_backward)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, new_residual, rstd = _add_forward(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(new_residual, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.zero_centered = zero_centered
        return y, new_residual

    backward = staticmethod(_add_rms_norm_backward)


# ---------------------------------------------------------------------------------------------- public

Implementation = Literal["fused", "reference"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    implementation: Implementation = "fused",
) -> Tensor:
    """x [..., hidden] divided by its root mean square over the last dimension, times weight [hidden].

    Computes y = x / sqrt(mean(x²) + eps) · weight (1 + weight when `zero_centered`) in fp32 and rounds once
    to the dtype of x: float32, bfloat16 or float16. Returns a contiguous tensor of x's shape; differentiable
    once.

    x may be a view whose last stride is 1 and whose leading dimensions fold into two strides, such as a
    transposed [b, s, hidden]; other strides are refused. weight has x's dtype and device.

    Raises RuntimeError for a wrong dtype, device, shape or stride, ValueError for an unknown implementation.
    """
    if not library.use_compiled(implementation, x.device.type):
        return rms_norm_reference(x, weight, eps, zero_centered)
    if torch.compiler.is_compiling():
        return _forward(x, weight, eps, zero_centered)[0]
    return _RMSNorm.apply(x, weight, eps, zero_centered)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    implementation: Implementation = "fused",
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm after it in one pass: returns (rms_norm(x + residual), x + residual).

    Bit for bit what `x + residual` followed by `rms_norm` gives, with one read of memory less; the backward
    adds the gradient of the new residual into dx in the same pass. Shapes, dtypes, strides and errors are
    those of `rms_norm`; residual has x's shape, dtype and device.
    """
    if not library.use_compiled(implementation, x.device.type):
        return add_rms_norm_reference(x, residual, weight, eps, zero_centered)
    if torch.compiler.is_compiling():
        return _add_forward(x, residual, weight, eps, zero_centered)[:2]
    return _AddRMSNorm.apply(x, residual, weight, eps, zero_centered)
