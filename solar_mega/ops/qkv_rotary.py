"""Rotary position embedding of Megatron's packed QKV: split, turn and lay out q, k and v in one pass.

    qkv = per group: q₀ … q_{per−1} k v           heads of d elements, one packed row per token

    x = a head of q or k, p the token's position, r = rotary_dim ≤ d, i = 0 … r/2 − 1, (a, b) = pair i of x:
    half style          a = x[i],   b = x[i + r/2]         (Llama, Mistral in Hugging Face's layout)
    interleaved style   a = x[2i],  b = x[2i + 1]

    a' = a · cos[p, i] − b · sin[p, i]
    b' = b · cos[p, i] + a · sin[p, i]            elements from r on, and v, are copied

The backward turns the gradients by the opposite angles (sin → −sin) and writes the packed gradient at once.

Shapes: qkv [s, b, groups, (queries_per_group + 2) · d]; q [s, b, groups · queries_per_group, d]; k, v
[s, b, groups, d]; cos, sin [positions, r / 2] fp32, which is where any rescaling of the frequencies is;
positions [s] or [s, b] int64, by default 0 … s − 1. Arithmetic is fp32, outputs are rounded once. Nothing is
overwritten, and nothing of size s·b is saved. Source: Su et al., "RoFormer" (arXiv 2104.09864), eq. 34.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library
from solar_mega.ops.rms_norm import Implementation

# ---------------------------------------------------------------------------------------------- reference


def qkv_rotary_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    queries_per_group: int,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in PyTorch: fp32 arithmetic (fp64 for fp64), rounded once; any device and strides."""
    _check_reference(qkv, cos, sin, queries_per_group, positions)
    s, b, groups, width = qkv.shape
    d = width // (queries_per_group + 2)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.view(s, b, groups, queries_per_group + 2, d)
    if positions is None:
        positions = torch.arange(s, device=qkv.device)
    positions = positions.view(s, -1)
    c, n = (table.to(wide)[positions].view(s, -1, 1, 1, table.shape[1]) for table in (cos, sin))
    turned = _turn(heads[..., :-1, :].to(wide), c, n, interleaved).to(qkv.dtype)
    q = turned[..., :-1, :].reshape(s, b, groups * queries_per_group, d)
    return q, turned[..., -1, :], heads[..., -1, :]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([pairs, rest], -1)


def _check_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, queries_per_group: int, positions: Tensor | None
) -> None:
    # The compiled op checks the same in C++ (csrc/common/qkv_rotary.h); here broadcasting would hide
    # mistakes.
    if qkv.dim() != 4 or queries_per_group < 1 or qkv.shape[3] % (queries_per_group + 2):
        raise RuntimeError(
            f"qkv_rotary: qkv has shape {list(qkv.shape)}; allowed: [s, b, groups, (queries_per_group + 2) * "
            f"head_dim] with queries_per_group = {queries_per_group}"
        )
    s, b, _, width = qkv.shape
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > width // (queries_per_group + 2):
        raise RuntimeError(
            f"qkv_rotary: cos has shape {list(cos.shape)} and sin {list(sin.shape)}; allowed: both "
            f"[positions, rotary_dim / 2] with rotary_dim up to {width // (queries_per_group + 2)}"
        )
    if positions is None and s > cos.shape[0]:
        raise RuntimeError(
            f"qkv_rotary: qkv has {s} positions but cos and sin only {cos.shape[0]} rows; "
            "give larger tables, or positions"
        )
    if positions is not None and positions.shape not in ((s,), (s, b)):
        raise RuntimeError(
            f"qkv_rotary: positions has shape {list(positions.shape)}; allowed: [{s}] or [{s}, {b}]"
        )


# ---------------------------------------------------------------------------------------------- op

if library.available():
    _forward = torch.ops.solar_mega.qkv_rotary.default
    _backward = torch.ops.solar_mega.qkv_rotary_backward.default

    @torch.library.register_fake("solar_mega::qkv_rotary")
    def _(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        queries_per_group: int,
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, groups, width = qkv.shape
        d = width // (queries_per_group + 2)
        return tuple(qkv.new_empty(s, b, heads, d) for heads in (groups * queries_per_group, groups, groups))

    @torch.library.register_fake("solar_mega::qkv_rotary_backward")
    def _(
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool = False,
    ) -> Tensor:
        s, b, heads, d = dq.shape
        return dq.new_empty(s, b, dk.shape[2], (heads // dk.shape[2] + 2) * d)


# ---------------------------------------------------------------------------------------------- autograd
#
# Twice, as in rms_norm.py: for torch.ops and torch.compile, and a lean one for eager mode.


def _heads(grad: Tensor) -> Tensor:
    """A gradient in strides the kernels take."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@once_differentiable
def _qkv_rotary_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    dqkv = _backward(_heads(dq), _heads(dk), _heads(dv), cos, sin, positions, ctx.interleaved)
    return dqkv, None, None, None, None, None


def _setup_qkv_rotary(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, cos, sin, positions, _, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


if library.available():
    torch.library.register_autograd(
        "solar_mega::qkv_rotary", _qkv_rotary_backward, setup_context=_setup_qkv_rotary
    )


class _QKVRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        queries_per_group: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(qkv, cos, sin, positions, queries_per_group, interleaved)

    backward = staticmethod(_qkv_rotary_backward)


# ---------------------------------------------------------------------------------------------- public


def qkv_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    queries_per_group: int,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    implementation: Implementation = "fused",
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv [s, b, groups, (queries_per_group + 2) · d] -> q [s, b, groups · queries_per_group, d] and
    k, v [s, b, groups, d], with q and k turned to their positions; contiguous, differentiable once in qkv.

    Args:
        qkv: float32, bfloat16 or float16; last stride 1, the others free.
        cos, sin: [positions, rotary_dim / 2] float32, contiguous, rotary_dim <= d; constants.
        positions: int64 [s] or [s, b], rows of cos and sin, any strides; by default the place in the
        sequence.
        interleaved: pairs are neighbours rather than half of rotary_dim apart.

    Raises RuntimeError for a wrong dtype, device, shape or stride and, on the CPU, for a position outside the
    tables (on CUDA, where looking would mean waiting for the device, that token's q and k are NaN).
    ValueError for an unknown implementation.
    """
    if not library.use_compiled(implementation, qkv.device.type):
        return qkv_rotary_reference(qkv, cos, sin, queries_per_group, positions, interleaved)
    if torch.compiler.is_compiling():
        return _forward(qkv, cos, sin, positions, queries_per_group, interleaved)
    return _QKVRotary.apply(qkv, cos, sin, positions, queries_per_group, interleaved)
