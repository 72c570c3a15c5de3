"""Token log-probs straight from hidden states: the logits of a language model's head exist in pieces only.

    logits = hidden · weightᵀ,   logp = token_logprob(logits, targets)            (formulas: token_logprob.py)
    dhidden = dlogits · weight   [summed over the shards of the vocabulary],   dweight = dlogitsᵀ · hidden

Shapes: hidden [..., h], targets [...], weight [V/tp, h], logp [...]. T tokens in all; pieces of logits take
at most `max_logits_bytes`. Two ways to the gradient, both with 6 T h V of necessary multiplications:

    weights given   pieces of tokens, all columns   [t, V/tp]   6 T h V: the gradient is made in the forward
    otherwise       pieces of columns, all tokens   [T, v]      8 T h V: the backward recomputes the logits

In the first, the way to go where time counts, the forward knows dlogits up to one factor, as the caller tells
it how the log-probs will be weighted, and keeps dhidden and dweight, the size of the results but dweight in
fp32, until the backward scales them. In the second, the way to go where memory counts, pieces of columns make
each piece of dweight complete after one product, accumulated in fp32 within it and rounded once, and the only
fp32 sum in memory is dhidden, [T, h].
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library
from solar_mega.ops.products import products_in_fp32
from solar_mega.ops.token_logprob import (
    Terms,
    _Fused,
    _Reference,
    evaluate,
    gathered,
    shards,
    token_logprob_reference,
)

MAX_LOGITS_BYTES = 64 * 2**20

# ---------------------------------------------------------------------------------------------- reference


def linear_token_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """`token_logprob_reference` of hidden · weightᵀ, all logits at once, in hidden's dtype; one shard."""
    return token_logprob_reference(hidden @ weight.t(), targets, **options)


# ---------------------------------------------------------------------------------------------- pieces


class Head(NamedTuple):
    """What every piece needs besides its numbers."""

    terms: Terms
    group: Any
    sequence_parallel: bool
    limit: int
    """Bytes of logits held at a time."""
    kernels: Any
    dtype: torch.dtype
    """Of the logits and of the factors of every product."""


def _product_dtype(hidden: Tensor) -> torch.dtype:
    widened = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and products_in_fp32()
    return torch.float32 if widened else hidden.dtype


def _pieces(count: int, bytes_each: int, limit: int, multiple: int) -> list[slice]:
    """`count` rows or columns in about equal pieces of at most `limit` bytes, cut at multiples."""
    most = max(limit // bytes_each // multiple * multiple, multiple)
    number = max(1, math.ceil(count / most))
    each = max(1, math.ceil(count / number / multiple)) * multiple
    return [slice(start, min(start + each, count)) for start in range(0, count, each)]


class _Scratch:
    """Memory for what is made for each piece, allocated once per name, as the first piece is no smaller than
    the others. Fresh memory for each would cost page faults on the CPU, and the C library's heap does not
    always fit one aligned block where the last one was."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.memory = like, {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self.memory:
            self.memory[name] = self.like.new_empty(rows * columns)
        return self.memory[name][: rows * columns].view(rows, columns)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out=self.take(name, a.shape[0], b.shape[1]))

    def widened(self, name: str, x: Tensor) -> Tensor:
        """x in the dtype of the products."""
        return x if x.dtype == self.like.dtype else self.take(name, *x.shape).copy_(x)


def _add_product(total: Tensor, a: Tensor, b: Tensor, limit: int) -> None:
    """total += a · b, total fp32 (or fp64)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # PyTorch's CPU products come rounded to the dtype of their factors
        for rows in _pieces(a.shape[0], b.shape[1] * b.element_size(), limit, 64):
            total[rows].add_(a[rows] @ b)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != a.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _gather_sequence(hidden: Tensor, head: Head) -> Tensor:
    """This rank's part of the sequence -> all of it, flattened to [T, h], in the dtype of the products."""
    if head.sequence_parallel and shards(head.group)[0] > 1:
        hidden = gathered(hidden.contiguous(), head.group).flatten(0, 1)
    return hidden.reshape(-1, hidden.shape[-1]).to(head.dtype)


def _sum_shards(dhidden: Tensor, like: Tensor, head: Head) -> Tensor:
    """dhidden [T, h] of this rank's columns -> of all columns, in the shape of this rank's hidden."""
    dhidden = dhidden.to(like.dtype)
    if shards(head.group)[0] == 1:
        return dhidden.view(like.shape)
    if not head.sequence_parallel:
        dist.all_reduce(dhidden, group=head.group)
        return dhidden.view(like.shape)
    mine = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.reduce_scatter_tensor(mine.view(-1, like.shape[-1]), dhidden, group=head.group)
    return mine


# ---------------------------------------------------------------------------------------------- columns


def _forward_by_columns(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, head: Head):
    """(logps, saved) of x [T, h] without a gradient."""
    first, size, smoothing, z = head.terms
    stats = []
    pieces = _pieces(weight.shape[0], x.shape[0] * x.element_size(), head.limit, 64)
    scratch = _Scratch(x)
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
    pieces = _pieces(weight.shape[0], x.shape[0] * x.element_size(), head.limit, 64)
    scratch = _Scratch(x)
    for piece in pieces:
        part = scratch.widened("weight", weight[piece])
        dlogits = scratch.product("logits", x, part.t())  # logits until the next line
        head.kernels.backward_(dlogps, dlogits, targets, saved, first + piece.start, *rest)
        if dweight is not None and dweight.dtype == x.dtype:
            torch.mm(dlogits.t(), x, out=dweight[piece])
        elif dweight is not None:
            dweight[piece] = scratch.product("dweight", dlogits.t(), x)
        if dhidden is not None:
            _add_product(dhidden, dlogits, part, head.limit)
    return dhidden, dweight


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, head: Head
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            x = _gather_sequence(hidden, head)
            logps, saved = _forward_by_columns(x, weight, targets, mask, head)
        ctx.save_for_backward(hidden, weight, targets, saved)
        ctx.head = head
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        x = _gather_sequence(hidden, ctx.head)
        dhidden, dweight = _backward_by_columns(
            dlogps.contiguous(), x, weight, targets, saved, ctx.head, wanted
        )
        dhidden = None if dhidden is None else _sum_shards(dhidden, hidden, ctx.head)
        return dhidden, dweight, None, None, None


# ---------------------------------------------------------------------------------------------- tokens


def _gradient_by_tokens(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    head: Head,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logps, dhidden, dweight) of x [T, h] for the gradient `weights` [T] of logps."""
    weight = weight.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    logps = torch.empty(x.shape[:1], dtype=wide, device=x.device)
    dhidden = torch.empty_like(x) if wanted[0] else None
    dweight = None
    pieces = _pieces(x.shape[0], weight.shape[0] * x.element_size(), head.limit, 16)
    scratch = _Scratch(x)
    for piece in pieces:
        part, labels, counted = x[piece], targets[piece], None if mask is None else mask[piece]
        logits = scratch.product("logits", part, weight.t())
        logps[piece], saved, *_ = evaluate(
            head.kernels, logits, labels, counted, head.terms, False, head.group
        )
        head.kernels.backward_(weights[piece], logits, labels, saved, *head.terms)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[piece])
        if wanted[1] and dweight is not None:
            _add_product(dweight, logits.t(), part, head.limit)
        elif wanted[1]:
            dweight = _product(logits.t(), part, x.dtype if len(pieces) == 1 else wide)
    return logps, dhidden, dweight


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
        weights: Tensor,
        head: Head,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            x = _gather_sequence(hidden, head)
            logps, dhidden, dweight = _gradient_by_tokens(
                x, weight, targets, mask, weights, head, ctx.needs_input_grad[:2]
            )
        ctx.save_for_backward(hidden, weight, weights)
        ctx.head, ctx.gradients = head, (dhidden, dweight)
        return logps

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
        factor = _common_factor(dlogps.reshape(-1), weights)
        # Most often the factor is 1; looking is free on the CPU and would stall a GPU.
        scaled = [g if g is None or _is_one(factor) else g.mul_(factor) for g in (dhidden, dweight)]
        dhidden = None if scaled[0] is None else _sum_shards(scaled[0], hidden, ctx.head)
        dweight = None if scaled[1] is None else scaled[1].to(weight.dtype)
        return dhidden, dweight, None, None, None, None


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
    token_weights: Tensor | None = None,
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
        until the backward. A broken promise is seen there and makes every gradient NaN.
    max_logits_bytes: of one piece of logits, in the dtype of hidden (fp32 on processors that multiply bf16
    more
        slowly than fp32); pieces are never smaller than 64 columns or 16 tokens.

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
    head = Head(terms, tp_group, sequence_parallel, max_logits_bytes, kernels, _product_dtype(hidden))
    if targets.numel() == 0:
        nothing = (hidden @ weight.t()).sum(-1).view(targets.shape)
        return nothing.to(torch.promote_types(hidden.dtype, torch.float32))
    flat = targets.reshape(-1)
    mask = None if mask is None else mask.reshape(-1)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if token_weights is None or not differentiable:
        logps = _ByColumns.apply(hidden, weight, flat, mask, head)
    else:
        logps = _ByTokens.apply(hidden, weight, flat, mask, token_weights.detach().reshape(-1), head)
    return logps.view(targets.shape)


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
