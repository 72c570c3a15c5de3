"""Token log-probs straight from hidden states: the logits of a language model's head exist in pieces only.

    logits = hidden · weightᵀ,   logp = token_logprob(logits, targets)            (formulas: token_logprob.py)
    dhidden = dlogits · weight   [summed over the shards of the vocabulary],   dweight = dlogitsᵀ · hidden

Shapes: hidden [..., h], targets [...], weight [V/tp, h], logp [...]. T tokens in all; pieces of logits take
at most `max_logits_bytes`. Two ways to the gradient, both with 6 T h V of necessary multiplications:

    weights given   pieces of tokens, all columns   [t, V/tp]   6 T h V: the gradient is made in the forward
    otherwise       pieces of columns, all tokens   [T, v]      8 T h V: the backward recomputes the logits

The first is the way to go where time counts (linear_by_tokens.py): its caller says how the log-probs will be
weighted, by a tensor or, where the weights depend on the log-probs as DPO's do on those of the pair, by a
function called piece by piece. The second is the way where memory counts (linear_by_columns.py).

Tokens that do not count cost nothing on the CPU: T is the number of those that do. (On a GPU their number
would have to be waited for, so there they are multiplied like the others.)
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from solar_mega.ops import library
from solar_mega.ops.linear_by_columns import ByColumns
from solar_mega.ops.linear_by_tokens import ByTokens, WeightsOf, plan_by_tokens
from solar_mega.ops.pieces import Head, product_dtype
from solar_mega.ops.token_logprob import Fused, Terms, shards
from solar_mega.ops.token_logprob_reference import (
    Reference,
    check_targets,
    counted_tokens,
    token_logprob_reference,
)

MAX_LOGITS_BYTES = 64 * 2**20


# ---------------------------------------------------------------------------------------------- reference


def linear_token_logprob_reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """`token_logprob_reference` of hidden · weightᵀ, all logits at once, in hidden's dtype; one shard."""
    return token_logprob_reference(hidden @ weight.t(), targets, **options)


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
        the same promise of weights that are computed from the log-probs. Where `max_logits_bytes` does not
        allow it, because of a long run between two cuts or on a CPU because of the fp32 sum, the weights are
        not asked for and the gradient is made the other way.
    max_logits_bytes: of one piece of logits, in the dtype of hidden. On a CPU that multiplies bf16 more
        slowly than fp32 (`products_in_fp32`) the logits are fp32, and what is widened beside them counts
        too; and on every CPU, by how much dweight's fp32 sum is larger than dweight. Pieces are never
        smaller than 64 columns or 16 tokens.

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
    kernels = Fused if library.use_compiled(implementation, hidden.device.type) else Reference
    terms = Terms(rank * columns, size, label_smoothing, z_loss)
    head = Head(terms, tp_group, sequence_parallel, max_logits_bytes, kernels, product_dtype(hidden))
    if targets.numel() == 0:
        nothing = (hidden @ weight.t()).sum(-1).view(targets.shape)
        return nothing.to(torch.promote_types(hidden.dtype, torch.float32))
    flat = targets.reshape(-1)
    mask = None if mask is None else mask.reshape(-1)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    check_targets(flat, counted_tokens(flat, mask), size)
    plan = None
    if differentiable and token_weights is not None:
        plan = plan_by_tokens(token_weights, hidden, weight, flat, mask, head)
    if plan is None:
        logps = ByColumns.apply(hidden, weight, flat, mask, head)
    else:
        logps = ByTokens.apply(hidden, weight, flat, mask, *plan, head)
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
