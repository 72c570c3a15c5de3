"""Causal attention on the CPU without the s × s matrix, with grouped heads, a sliding window, packed samples.

    S[i, j] = scale · q[i] · k[j]           for j ≤ i, and j > i − window where there is a window,
                                            and j of the same sample as i where samples are packed
    m[i] = maxⱼ S[i, j],   l[i] = Σⱼ exp(S[i, j] − m[i]),   P[i, j] = exp(S[i, j] − m[i]) / l[i]
    out[i] = Σⱼ P[i, j] · v[j]

    backward:
    dP[i, j] = dout[i] · v[j],   dS[i, j] = P[i, j] · (dP[i, j] − Σⱼ P[i, j] · dP[i, j])
    dq[i] = scale · Σⱼ dS[i, j] · k[j],   dk[j] = scale · Σᵢ dS[i, j] · q[i],   dv[j] = Σᵢ P[i, j] · dout[i]

Shapes: q, out, dq [s, b, groups · per, d]; k, v, dk, dv [s, b, groups, d], head h of q attending to group
⌊h / per⌋; stats = (m, l) [b, groups · per, s, 2] fp32, kept apart because the rounding of m + ln l would be
an error of P where scores are large. Arithmetic is fp32 for every dtype, outputs are rounded once; the inputs
and stats are saved. Source: Dao et al., "FlashAttention" (arXiv 2205.14135), algorithms 1 and 4.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library
from solar_mega.ops.rms_norm import Implementation

# ---------------------------------------------------------------------------------------------- reference


def causal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The formula with all scores at once: fp32 arithmetic (fp64 for fp64), rounded once; any device and
    strides.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[2] % k.shape[2] or k.shape != v.shape:
        raise RuntimeError(
            f"causal_attention: q has shape {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; "
            "allowed: [s, b, groups * queries_per_group, head_dim] and twice [s, b, groups, head_dim]"
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    per = q.shape[2] // k.shape[2]
    keys, values = (t.to(wide).repeat_interleave(per, 2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q.to(wide), keys) * _scale(q, scale)
    scores = scores.masked_fill(~band(q.shape[0], window, q.device, cu_seqlens), float("-inf"))
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), values).to(q.dtype)


def band(s: int, window: int, device: torch.device, cu_seqlens: Tensor | None = None) -> Tensor:
    """[s, s] bool: True where key j is visible to query i, which is i − window < j ≤ i, or j ≤ i without a
    window; of packed samples, which begin at `cu_seqlens` [samples + 1], only in the same one.
    """
    at = torch.arange(s, device=device)
    distance = at[:, None] - at[None, :]
    visible = (distance >= 0) & (distance < (window or s))
    if cu_seqlens is None:
        return visible
    sample = torch.bucketize(at, cu_seqlens.to(device=device, dtype=at.dtype), right=True)
    return visible & (sample[:, None] == sample[None, :])


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


# ---------------------------------------------------------------------------------------------- op

if library.available():
    _forward = torch.ops.solar_mega.causal_attention.default
    _backward = torch.ops.solar_mega.causal_attention_backward.default

    @torch.library.register_fake("solar_mega::causal_attention")
    def _(
        q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s, b, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty(b, heads, s, 2, dtype=torch.float32)

    @torch.library.register_fake("solar_mega::causal_attention_backward")
    def _(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stats: Tensor,
        scale: float,
        window: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ---------------------------------------------------------------------------------------------- autograd
#
# Twice, as in rms_norm.py: for torch.ops and torch.compile, and a lean one for eager mode.


@once_differentiable
def _causal_attention_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, stats = ctx.saved_tensors
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    packed = () if ctx.cu_seqlens is None else (ctx.cu_seqlens,)
    return *_backward(dout, q, k, v, stats, ctx.scale, ctx.window, *packed), None, None, None


def _setup_causal_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.scale, ctx.window, ctx.cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.mark_non_differentiable(output[1])


if library.available():
    torch.library.register_autograd(
        "solar_mega::causal_attention", _causal_attention_backward, setup_context=_setup_causal_attention
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, cu_seqlens: Tensor | None
    ) -> Tensor:
        packed = () if cu_seqlens is None else (cu_seqlens,)
        with torch._C._AutoDispatchBelowAutograd():
            out, stats = _forward(q, k, v, scale, window, *packed)
        ctx.save_for_backward(q, k, v, stats)
        ctx.scale, ctx.window, ctx.cu_seqlens = scale, window, cu_seqlens
        return out

    backward = staticmethod(_causal_attention_backward)


# ---------------------------------------------------------------------------------------------- public


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    cu_seqlens: Tensor | None = None,
    implementation: Implementation = "fused",
) -> Tensor:
    """q [s, b, groups · per, d], k and v [s, b, groups, d] -> [s, b, groups · per, d], contiguous on the CPU.

    Args:
        q, k, v: float32, bfloat16 or float16, last stride 1, the others free.
        scale: of the scores; by default 1 / sqrt(d).
        window: keys that a query sees, itself included; 0 for all before it.
        cu_seqlens: [samples + 1] int32 from 0 to s, where the samples packed along s begin and end: none sees
            another. The same for all of b.

    Differentiable once. On other devices than the CPU, and without the compiled extension, PyTorch's
    `scaled_dot_product_attention` computes it.

    Raises RuntimeError for a wrong dtype, device, shape or stride, ValueError for an unknown implementation.
    """
    if implementation == "fused" and (q.device.type != "cpu" or not library.available()):
        return _sdpa(q, k, v, scale, window, cu_seqlens)
    if not library.use_compiled(implementation, q.device.type):
        return causal_attention_reference(q, k, v, scale, window, cu_seqlens)
    if torch.compiler.is_compiling():
        return _forward(q, k, v, _scale(q, scale), window, cu_seqlens)[0]
    return _CausalAttention.apply(q, k, v, _scale(q, scale), window, cu_seqlens)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, cu_seqlens: Tensor | None
) -> Tensor:
    limited = 0 < window < q.shape[0] or cu_seqlens is not None
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, heads, s, d], views
    mask = band(q.shape[2], window, q.device, cu_seqlens) if limited else None
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not limited, scale=scale, enable_gqa=grouped
    )
    return context.permute(2, 0, 1, 3)
