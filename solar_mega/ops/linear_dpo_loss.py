"""A preference loss straight from hidden states, over a vocabulary split among ranks; all logits never exist.

    logits = hidden · weightᵀ  ->  logp per token  ->  sums per response  ->  loss, and c = ∂loss/∂logp

Every pair's c depends on its own log-probs only. So the pairs are taken piece by piece, as many as fit in the
memory bound: their logits, their log-probs, their c, and from those the gradient, made while the logits are
still there. 6 T h V multiplications, as with all logits in memory; nothing is computed twice. A pair too long
for the bound goes the way of `linear_token_logprob` without weights, which recomputes logits instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solar_mega.ops.dpo_loss import DPOLoss, dpo_loss
from solar_mega.ops.linear_token_logprob import MAX_LOGITS_BYTES, WeightsOf, linear_token_logprob


def dpo_token_weights(
    ends: Sequence[int],
    tokens: int,
    *,
    mask: Tensor | None = None,
    reference_logps: Tensor | None = None,
    **options,
) -> WeightsOf | None:
    """The gradient of P · `dpo_loss(logps, ends, mask=, reference_logps=, **options)`, P pairs, pair by pair:
    `token_weights` for `linear_token_logprob` over `tokens` tokens.

    ends: cu_seqlens as plain numbers, [2P + 1], so that a GPU need not be waited for.
    None where a pair's weights depend on other pairs: an SFT term averaged over all chosen tokens.
    """
    if options.get("rpo_alpha") and options.get("rpo_mean", "tokens") == "tokens":
        return None
    pairs = list(ends[::2])

    def weigh(logps: Tensor, part: slice) -> Tensor:
        first, last = pairs.index(part.start), len(pairs) - 1
        while pairs[last] > part.stop:
            last -= 1
        if last <= first:  # padding after the last pair
            return torch.zeros_like(logps)
        inside = [end - part.start for end in ends[2 * first : 2 * last + 1]]
        reference = None if reference_logps is None else reference_logps[2 * first : 2 * last]
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = dpo_loss(
                leaf,
                torch.tensor(inside, dtype=torch.int32, device=logps.device),
                mask=None if mask is None else mask[part],
                reference_logps=reference,
                **options,
            ).loss
            return torch.autograd.grad(loss * (last - first), leaf)[0]

    cuts = pairs if pairs[-1] == tokens else [*pairs, tokens]
    return WeightsOf(weigh, cuts)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ends: Sequence[int],
    *,
    mask: Tensor | None = None,
    reference_logps: Tensor | None = None,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    **options: Any,
) -> DPOLoss:
    """`dpo_loss` of `linear_token_logprob(hidden, weight, targets)`.

    hidden: [T, h] (or [T/tp, h] with `sequence_parallel`); weight: [V/tp, h]; targets: int64 [T].
    ends: the 2P + 1 offsets of the sequences, as plain numbers: chosen and rejected response in turn.
    mask: bool [T], the tokens that count. reference_logps: [2P], as in `dpo_loss`.
    options: those of `dpo_loss`: variant, beta, label_smoothing, rpo_alpha, rpo_mean, implementation.

    Differentiable once, through `loss`. Raises what the two raise.
    """
    weights = dpo_token_weights(ends, targets.numel(), mask=mask, reference_logps=reference_logps, **options)
    logps = linear_token_logprob(
        hidden,
        weight,
        targets,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        mask=mask,
        token_weights=weights,
        vocab_size=vocab_size,
        max_logits_bytes=max_logits_bytes,
        implementation=options.get("implementation", "fused"),
    )
    offsets = torch.tensor(list(ends), dtype=torch.int32, device=hidden.device)
    return dpo_loss(logps, offsets, mask=mask, reference_logps=reference_logps, **options)
