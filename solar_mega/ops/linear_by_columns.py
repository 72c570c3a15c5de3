"""`linear_token_logprob` where memory counts: pieces of columns, all tokens at a time, logits computed twice.

    logits [T, v]  = x · Wᵀ   W [v, h]      forward: the piece's maximum, sum and target logit per token
    dlogits [T, v] = formula(x · Wᵀ)        backward: the logits again, and their gradient over them
    dhidden [T, h] += dlogits · W           the only fp32 sum in memory
    dweight [v, h]  = dlogitsᵀ · x          complete after one product, rounded once

8 T h V multiplications of which 6 are necessary. Formulas and shapes: linear_token_logprob.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops.pieces import Counted, Head, Scratch, gather_sequence, multiply, pieces_of, sum_shards
from solar_mega.ops.token_logprob import gathered, shards


def _pieces(x: Tensor, weight: Tensor, head: Head) -> list[slice]:
    """Columns in pieces whose logits, and rows of the head where they are widened, keep within the limit."""
    widened = weight.shape[1] if weight.dtype != head.dtype else 0
    return pieces_of(weight.shape[0], (x.shape[0] + widened) * head.dtype.itemsize, head.limit, 64)


def _forward_by_columns(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, head: Head):
    """(logps, saved) of x [T, h] without a gradient."""
    first, size, smoothing, z = head.terms
    stats, scratch = [], Scratch(head.dtype, x.device)
    x = x.to(head.dtype)
    for piece in _pieces(x, weight, head):
        logits = scratch.product("logits", x, scratch.widened("weight", weight[piece]).t())
        stats.append(
            head.kernels.partial(logits, targets, mask, first + piece.start, size, smoothing != 0, False)
        )
    joined = torch.stack(stats)
    if shards(head.group)[0] > 1:
        joined = gathered(joined, head.group).flatten(0, 1)
    return head.kernels.combine(joined, size, smoothing, z, False)[:2]


def _backward_by_columns(
    dlogps: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: Tensor,
    head: Head,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    first, *rest = head.terms
    wide = torch.promote_types(x.dtype, torch.float32)
    dhidden = torch.zeros(x.shape, dtype=wide, device=x.device) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] else None
    scratch = Scratch(head.dtype, x.device)
    x = x.to(head.dtype)
    for piece in _pieces(x, weight, head):
        part = scratch.widened("weight", weight[piece])
        dlogits = scratch.product("logits", x, part.t())  # logits until the next line
        head.kernels.backward_(dlogps, dlogits, targets, saved, first + piece.start, *rest)
        if dhidden is not None:
            multiply(dhidden, dlogits, part, add=True)
        if dweight is not None and dweight.dtype == x.dtype:
            torch.mm(dlogits.t(), x, out=dweight[piece])
        elif dweight is not None:
            dweight[piece] = scratch.product("weight", dlogits.t(), x)  # over `part`, by now used
    return dhidden, dweight


class ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, head: Head
    ) -> Tensor:
        counted = Counted.of(targets, mask)
        targets, mask = counted.take(targets), None if mask is None else counted.take(mask)
        with torch._C._AutoDispatchBelowAutograd():
            x = counted.take(gather_sequence(hidden, head))
            logps, saved = _forward_by_columns(x, weight, targets, mask, head)
        ctx.save_for_backward(hidden, weight, targets, saved)
        ctx.head, ctx.counted = head, counted
        return counted.put(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        x = ctx.counted.take(gather_sequence(hidden, ctx.head))
        dlogps = ctx.counted.take(dlogps).contiguous()
        dhidden, dweight = _backward_by_columns(dlogps, x, weight, targets, saved, ctx.head, wanted)
        dhidden = None if dhidden is None else sum_shards(ctx.counted.put(dhidden), hidden, ctx.head)
        return dhidden, dweight, None, None, None
