"""Token log-probs straight from hidden states: the logits of a language model's head exist in pieces only.

    logits = hidden · weightᵀ,   logp = token_logprob(logits, targets)            (formulas: token_logprob.py)
    dhidden = dlogits · weight   [summed over the shards of the vocabulary],   dweight = dlogitsᵀ · hidden

Shapes: hidden [..., h], targets [...], weight [V/tp, h], logp [...]. T tokens in all; pieces of logits take
at most `max_logits_bytes`. Two ways to the gradient, both with 6 T h V of necessary multiplications:

    weights given   pieces of tokens, all columns   [t, V/tp]   6 T h V: the gradient is made in the forward
    otherwise       pieces of columns, all tokens   [T, v]      8 T h V: the backward recomputes the logits

In the first, the way to go where time counts, the forward knows dlogits up to one factor, as the caller tells
it how the log-probs will be weighted (a tensor; or, where the weights depend on the log-probs as DPO's do on
those of the pair, a function called piece by piece), and keeps dhidden and dweight, the size of the results
but dweight in fp32, until the backward scales them. In the second, the way to go where memory counts, pieces
of columns make each piece of dweight complete after one product, accumulated in fp32 within it and rounded
once, and the only fp32 sum in memory is dhidden, [T, h].

Tokens that do not count cost nothing on the CPU: T is the number of those that do. (On a GPU their number
would have to be waited for, so there they are multiplied like the others.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library
from solar_mega.ops.pieces import (
    Counted,
    Head,
    Scratch,
    add_product,
    gather_sequence,
    pieces_of,
    product,
    product_dtype,
    sum_shards,
)
from solar_mega.ops.token_logprob import (
    Terms,
    _Fused,
    _Reference,
    check_targets,
    counted_tokens,
    evaluate,
    gathered,
    shards,
    token_logprob_reference,
)

MAX_LOGITS_BYTES = 64 * 2**20


class WeightsOf(NamedTuple):
    """Token weights that follow from log-probs, as those of a preference loss follow from its pair's."""

    weigh: Callable[[Tensor, slice], Tensor]
    """(logps [t], which tokens they are, of all T) -> weights [t] fp32. Called once for each piece, without
    gradient, on every rank alike."""

    cuts: Sequence[int]
    """Rising token numbers from 0 to T between which the weights depend on each other; pieces begin there."""


# ---------------------------------------------------------------------------------------------- reference


def linear_token_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """`token_logprob_reference` of hidden · weightᵀ, all logits at once, in hidden's dtype; one shard."""
    return token_logprob_reference(hidden @ weight.t(), targets, **options)


# ---------------------------------------------------------------------------------------------- columns


def _forward_by_columns(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, head: Head):
    """(logps, saved) of x [T, h] without a gradient."""
    first, size, smoothing, z = head.terms
    stats = []
    pieces = pieces_of(weight.shape[0], x.shape[0] * x.element_size(), head.limit, 64)
    scratch = Scratch(x)
    for piece in pieces:
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
    pieces = pieces_of(weight.shape[0], x.shape[0] * x.element_size(), head.limit, 64)
    scratch = Scratch(x)
    for piece in pieces:
        part = scratch.widened("weight", weight[piece])
        dlogits = scratch.product("logits", x, part.t())  # logits until the next line
        head.kernels.backward_(dlogps, dlogits, targets, saved, first + piece.start, *rest)
        if dweight is not None and dweight.dtype == x.dtype:
            torch.mm(dlogits.t(), x, out=dweight[piece])
        elif dweight is not None:
            dweight[piece] = scratch.product("dweight", dlogits.t(), x)
        if dhidden is not None:
            add_product(dhidden, dlogits, part, head.limit)
    return dhidden, dweight


class _ByColumns(torch.autograd.Function):
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


# ---------------------------------------------------------------------------------------------- tokens


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logps, weights, dhidden, dweight) of x [T, h] for the gradient `weights` [T] of logps."""
    weight = weight.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    logps = torch.empty(x.shape[:1], dtype=wide, device=x.device)
    weights = torch.empty_like(logps)
    dhidden = torch.empty_like(x) if wanted[0] else None
    dweight = None
    scratch = Scratch(x)
    for piece in pieces:
        part, labels, counted = x[piece], targets[piece], None if mask is None else mask[piece]
        with torch._C._AutoDispatchBelowAutograd():
            logits = scratch.product("logits", part, weight.t())
            logps[piece], saved, *_ = evaluate(
                head.kernels, logits, labels, counted, head.terms, False, head.group
            )
        weights[piece] = weigh(logps[piece], piece)
        with torch._C._AutoDispatchBelowAutograd():
            head.kernels.backward_(weights[piece], logits, labels, saved, *head.terms)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[piece])
        if wanted[1] and dweight is not None:
            add_product(dweight, logits.t(), part, head.limit)
        elif wanted[1]:
            dweight = product(logits.t(), part, x.dtype if len(pieces) == 1 else wide)
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
    largest = weights.abs().argmax()
    peak = weights[largest]
    factor = torch.where(peak == 0, 0, dlogps[largest] / peak)
    off = (dlogps - factor * weights).abs().amax()
    return torch.where(off <= 1e-5 * dlogps.abs().amax(), factor, torch.nan)


class _ByTokens(torch.autograd.Function):
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
        ctx.save_for_backward(hidden, weight, weights)
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
        hidden, weight, weights = ctx.saved_tensors
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        factor = _common_factor(ctx.counted.take(dlogps.reshape(-1)), weights)
        # Most often the factor is 1; looking is free on the CPU and would stall a GPU.
        scaled = [g if g is None or _is_one(factor) else g.mul_(factor) for g in (dhidden, dweight)]
        dhidden = None if scaled[0] is None else sum_shards(ctx.counted.put(scaled[0]), hidden, ctx.head)
        dweight = None if scaled[1] is None else scaled[1].to(weight.dtype)
        return dhidden, dweight, *[None] * 6


def _is_one(factor: Tensor) -> bool:
    return not factor.is_cuda and factor.item() == 1


# ---------------------------------------------------------------------------------------------- public

Implementation = Literal["fused", "reference"]


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    mask: Tensor | None = None,
    token_weights: Tensor | WeightsOf | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    implementation: Implementation = "fused",
) -> Tensor:
    """`token_logprob(hidden @ weight.T, targets)` with at most `max_logits_bytes` of logits at a time.

    hidden [..., h], weight [V/tp, h] (the head, or the embedding it is tied to), targets [...] int64 -> [...]
    fp32, nats. hidden is the same on every rank of `tp_group`, or with `sequence_parallel` rank r's part of
    dimension 0, [s/tp, ...]; targets, mask and the result always cover all tokens. The gradient of hidden is
    summed over the ranks, that of weight is this rank's.

    token_weights: fp32 [...]. A promise that the gradient reaching this function is token_weights times one
        number, as that of (token_weights * logps).sum() is, at whatever loss scale. The gradients are then
        made in the forward, which saves a quarter of the multiplications and holds dweight (fp32) and dhidden
        until the backward. A broken promise is seen there and makes every gradient NaN. Or a `WeightsOf`,
        the same promise of weights that are computed from the log-probs; where the tokens between two of its
        cuts have more logits than `max_logits_bytes`, the weights are not asked for and the memory bound is
        kept by the other way to the gradient.
    max_logits_bytes: of one piece of logits, in the dtype of hidden (fp32 on processors that multiply bf16
        more slowly than fp32); pieces are never smaller than 64 columns or 16 tokens.

    The other arguments, and what is raised, are those of `token_logprob`.
    """
    ranks, rank = shards(tp_group)
    _check(hidden, weight, targets, mask, token_weights, max_logits_bytes, ranks if sequence_parallel else 1)
    columns = weight.shape[0]
    size = ranks * columns if vocab_size is None else vocab_size
    if not 1 <= size <= ranks * columns:
        raise RuntimeError(
            f"linear_token_logprob: vocab_size is {size}; allowed: 1 to {ranks * columns}, "
            "the rows of all ranks' weight"
        )
    kernels = _Fused if library.use_compiled(implementation, hidden.device.type) else _Reference
    terms = Terms(rank * columns, size, label_smoothing, z_loss)
    head = Head(terms, tp_group, sequence_parallel, max_logits_bytes, kernels, product_dtype(hidden))
    if targets.numel() == 0:
        nothing = (hidden @ weight.t()).sum(-1).view(targets.shape)
        return nothing.to(torch.promote_types(hidden.dtype, torch.float32))
    flat = targets.reshape(-1)
    mask = None if mask is None else mask.reshape(-1)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    check_targets(flat, counted_tokens(flat, mask), size)
    plan = _plan_by_tokens(token_weights, flat, mask, head, columns) if differentiable else None
    if plan is None:
        logps = _ByColumns.apply(hidden, weight, flat, mask, head)
    else:
        logps = _ByTokens.apply(hidden, weight, flat, mask, *plan, head)
    return logps.view(targets.shape)


def _plan_by_tokens(given: Tensor | WeightsOf | None, targets, mask, head: Head, columns: int):
    """(tokens that count, their weights, pieces), or None where the gradient is to be made by columns."""
    if given is None:
        return None
    counted = Counted.of(targets, mask)
    count = counted.tokens if counted.rows is None else counted.rows.numel()
    bytes_each, cuts = columns * head.dtype.itemsize, None
    if isinstance(given, Tensor):
        given = given.detach().reshape(-1)
    else:
        cuts = [counted.cut(position) for position in given.cuts]
        if max(b - a for a, b in zip(cuts, cuts[1:], strict=False)) * bytes_each > head.limit:
            return None
    return counted, _weigher(given, counted), _pieces_of_tokens(count, bytes_each, head.limit, cuts)


def _check(hidden, weight, targets, mask, token_weights, limit, sequence_shards) -> None:
    def refuse(text: str) -> None:
        raise RuntimeError(f"linear_token_logprob: {text}")

    if not hidden.is_floating_point() or hidden.dim() < 2:
        refuse(f"hidden is {hidden.dtype} of shape {list(hidden.shape)}; allowed: floating point, [..., h]")
    if (weight.dtype, weight.device) != (hidden.dtype, hidden.device):
        got, must = f"{weight.dtype} on {weight.device}", f"{hidden.dtype} on {hidden.device}"
        refuse(f"weight is {got}; it must be {must}, as hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        must = f"[columns, {hidden.shape[-1]}], as hidden is [..., h]"
        refuse(f"weight has shape {list(weight.shape)}; it must be {must}")
    tokens = [hidden.shape[0] * sequence_shards, *hidden.shape[1:-1]]
    wanted = {"targets": (targets, torch.int64), "mask": (mask, torch.bool)}
    if isinstance(token_weights, WeightsOf):
        cuts = list(token_weights.cuts)
        if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != math.prod(tokens) or cuts != sorted(cuts):
            refuse(f"token_weights.cuts is {cuts}; it must rise from 0 to {math.prod(tokens)}, the tokens")
    else:
        wanted["token_weights"] = (token_weights, torch.promote_types(hidden.dtype, torch.float32))
    for name, (tensor, dtype) in wanted.items():
        if tensor is None:
            continue
        if (tensor.dtype, tensor.device) != (dtype, hidden.device):
            refuse(f"{name} is {tensor.dtype} on {tensor.device}; it must be {dtype} on {hidden.device}")
        if list(tensor.shape) != tokens:
            got = list(tensor.shape)
            refuse(f"{name} has shape {got}; it must be {tokens}, one value per token of hidden")
    if limit < 1:
        refuse(f"max_logits_bytes is {limit}; allowed: a positive number of bytes")
