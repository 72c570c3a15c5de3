"""`linear_token_logprob` where time counts: pieces of tokens, all columns at a time, logits computed once.

The forward knows dlogits up to one factor, as the caller tells it how the log-probs will be weighted. It
makes the gradients while the logits are there and keeps them until the backward knows the factor:

    logits [t, V]  = x · Wᵀ                 x [t, h] a piece of the hidden states, W all of the head
    dlogits [t, V] = formula(logits) at the token weights
    dhidden [t, h] = dlogits · W            complete after one piece
    dweight [V, h] += dlogitsᵀ · x          an fp32 sum over the pieces, kept until the backward

6 T h V multiplications, all of them necessary. Where the factors of products are wider than the head, it is
widened block by block. Formulas and shapes: linear_token_logprob.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops.pieces import (
    BLOCK_BYTES,
    Counted,
    Head,
    Scratch,
    WideSum,
    blocks_of,
    gather_sequence,
    multiply,
    pieces_of,
    sum_shards,
)
from solar_mega.ops.token_logprob import evaluate

FEWEST = 160
"""Tokens of a piece beside an fp32 sum of dweight that the limit has to hold: with fewer, going through that
sum for every piece costs more than computing the logits twice (measured for hidden sizes of 1024)."""


class WeightsOf(NamedTuple):
    """Token weights that follow from log-probs, as those of a preference loss follow from its pair's."""

    weigh: Callable[[Tensor, slice], Tensor]
    """(logps [t], which tokens they are, of all T) -> weights [t] fp32. Called once for each piece, without
    gradient, on every rank alike."""

    cuts: Sequence[int]
    """Rising token numbers from 0 to T between which the weights depend on each other; pieces begin there."""


class Plan(NamedTuple):
    """How the gradient is to be made."""

    counted: Counted
    weigh: Callable[[Tensor, slice], Tensor]
    """(logps of counted tokens, which of them) -> their weights."""
    pieces: list[slice]


def plan_by_tokens(
    given: Tensor | WeightsOf,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    head: Head,
) -> Plan | None:
    """None where the limit leaves too little for a piece of tokens. hidden [..., h]; targets, mask [T]."""
    counted = Counted.of(targets, mask)
    count = counted.tokens if counted.rows is None else counted.rows.numel()
    widened = weight.shape[1] if weight.dtype != head.dtype else 0
    bytes_each = (weight.shape[0] + widened) * head.dtype.itemsize
    beside = _bytes_beside(count, hidden, weight, head)
    room = head.limit - beside
    if beside and room < min(FEWEST, count) * bytes_each:
        return None
    cuts = None
    if isinstance(given, Tensor):
        given = given.detach().reshape(-1)
    else:
        cuts = [counted.cut(position) for position in given.cuts]
        if max(b - a for a, b in zip(cuts, cuts[1:], strict=False)) * bytes_each > room:
            return None
    return Plan(counted, _weigher(given, counted), _pieces_of_tokens(count, bytes_each, room, cuts))


def _bytes_beside(tokens: int, hidden: Tensor, weight: Tensor, head: Head) -> int:
    """By how much fp32 sums outgrow the 16-bit gradients they become, and a block of the head or of them. On
    a GPU this is not counted: there the multiplications saved are worth the memory."""
    excess = 4 - weight.element_size()
    if hidden.device.type != "cpu" or excess <= 0:
        return 0
    rows = weight.shape[0] if weight.requires_grad else 0
    rows += tokens if hidden.requires_grad and weight.dtype != head.dtype else 0
    return rows * weight.shape[1] * excess + BLOCK_BYTES


def _pieces_of_tokens(count: int, bytes_each: int, limit: int, cuts: Sequence[int] | None) -> list[slice]:
    """`count` tokens in pieces of at most `limit` bytes of logits, begun at `cuts` only, where there are any;
    the tokens between two cuts stay together however many they are."""
    if cuts is None:
        return pieces_of(count, bytes_each, limit, 16)
    pieces, start = [], 0
    for end, following in zip(cuts[1:], [*cuts[2:], None], strict=True):
        if end > start and (following is None or (following - start) * bytes_each > limit):
            pieces.append(slice(start, end))
            start = end
    return sorted(pieces, key=lambda piece: piece.start - piece.stop)  # the longest first, for Scratch


def _gradient_by_tokens(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    weigh: Callable[[Tensor, slice], Tensor],
    pieces: list[slice],
    head: Head,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, WideSum | None]:
    """(logps, weights, dhidden, dweight) of x [T, h] for the gradient `weights` [T] of logps."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logps = torch.empty(x.shape[:1], dtype=wide, device=x.device)
    weights = torch.empty_like(logps)
    dhidden = torch.empty_like(x, dtype=head.dtype) if wanted[0] else None
    # One piece is one product, which comes in head.dtype.
    dweight = WideSum(weight, head.dtype if len(pieces) == 1 else wide) if wanted[1] else None
    scratch = Scratch(head.dtype, x.device)
    blocks = [slice(0, weight.shape[0])] if weight.dtype == head.dtype else blocks_of(weight, head.dtype)
    for number, piece in enumerate(pieces):
        part, labels, counted = x[piece], targets[piece], None if mask is None else mask[piece]
        with torch._C._AutoDispatchBelowAutograd():
            part = scratch.widened("hidden", part)
            logits = scratch.take("logits", part.shape[0], weight.shape[0])
            for block in blocks:
                torch.mm(part, scratch.widened("weight", weight[block]).t(), out=logits[:, block])
            logps[piece], saved, *_ = evaluate(
                head.kernels, logits, labels, counted, head.terms, False, head.group
            )
        weights[piece] = weigh(logps[piece], piece)
        with torch._C._AutoDispatchBelowAutograd():
            head.kernels.backward_(weights[piece], logits, labels, saved, *head.terms)  # now dlogits
            for block in blocks:
                dlogits = logits[:, block]
                if dhidden is not None:
                    rows = scratch.widened("weight", weight[block])
                    multiply(dhidden[piece], dlogits, rows, add=block.start > 0)
                if dweight is not None:
                    dweight.multiply(block, dlogits.t(), part, add=number > 0)
    return logps, weights, dhidden, dweight


def _weigher(given: "Tensor | WeightsOf", counted: Counted) -> Callable[[Tensor, slice], Tensor]:
    """`given` for the counted tokens alone: (their logps, which of them) -> their weights."""
    if isinstance(given, Tensor):
        weights = counted.take(given)
        return lambda logps, piece: weights[piece]
    if counted.rows is None:
        return given.weigh
    rows, cuts = counted.rows, [(counted.cut(position), position) for position in given.cuts]

    def weigh(logps: Tensor, piece: slice) -> Tensor:
        """Pieces begin at cuts; the tokens that do not count between them get log-prob 0, as they have."""
        start = next(position for taken, position in cuts if taken == piece.start)
        stop = next(position for taken, position in cuts if taken == piece.stop and position > start)
        inside = rows[piece] - start
        every = logps.new_zeros(stop - start).index_copy_(0, inside, logps)
        return given.weigh(every, slice(start, stop))[inside]

    return weigh


def _common_factor(dlogps: Tensor, weights: Tensor) -> Tensor:
    """The c of dlogps = c · weights, NaN where there is none; found without a host sync."""
    largest = weights.abs().argmax(0, keepdim=True)
    peak = weights.gather(0, largest)  # weights[largest] would ask for the number
    factor = torch.where(peak == 0, 0, dlogps.gather(0, largest) / peak).squeeze(0)
    off = (dlogps - factor * weights).abs().amax()
    return torch.where(off <= 1e-5 * dlogps.abs().amax(), factor, torch.nan)


class ByTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        counted: Counted,
        weigh: Callable[[Tensor, slice], Tensor],
        pieces: list[slice],
        head: Head,
    ) -> Tensor:
        targets, mask = counted.take(targets), None if mask is None else counted.take(mask)
        with torch._C._AutoDispatchBelowAutograd():
            x = counted.take(gather_sequence(hidden, head))
        logps, weights, dhidden, dweight = _gradient_by_tokens(
            x, weight, targets, mask, weigh, pieces, head, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(hidden, weights)
        ctx.head, ctx.counted, ctx.gradients = head, counted, (dhidden, dweight)
        return counted.put(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_logprob: a second backward, but with token_weights the gradients exist once; "
                "call it without token_weights to differentiate twice"
            )
        hidden, weights = ctx.saved_tensors
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        factor = _common_factor(ctx.counted.take(dlogps.reshape(-1)), weights)
        # Most often the factor is 1; looking is free on the CPU and would stall a GPU.
        factor = None if not factor.is_cuda and factor.item() == 1 else factor
        if dhidden is not None:
            dhidden = dhidden if factor is None else dhidden.mul_(factor)
            dhidden = sum_shards(ctx.counted.put(dhidden), hidden, ctx.head)
        return dhidden, None if dweight is None else dweight.rounded(factor), *[None] * 6
