"""DPO as an objective of the shared trainer: packed rows -> sums over pairs.

    loss = 1/pairs Σ variant(Σ_t log π - log π_ref of chosen, of rejected)         variants: ops.dpo_loss

What counts are pairs, so the mean over the global batch is exact however it was cut. Log-probs come from
`LossHead`, which never holds all logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from solar_mega.config.dpo import LossConfig
from solar_mega.model.head import Weighing
from solar_mega.ops.dpo_loss import DPOLoss, dpo_loss, dpo_loss_reference
from solar_mega.ops.linear_dpo_loss import dpo_token_weights
from solar_mega.train.step import Batch, Objective, Reduced, packing_of

STATISTICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "loss/pairs",
    "loss/nll",
    "gradient_weight",
    "kl",
    "length_difference",
    "longer_favoured",
)
"""Means over pairs:

- rewards, logps: as TRL reports them; a reward is beta · (log π - log π_ref), an accuracy is 0 at a tie
- loss/pairs: without the likelihood term; loss/nll: per token of the chosen response
- gradient_weight: σ(-margin), the factor DPO's gradient gives a pair (arXiv 2305.18290, section 4); it falls
  from 1/2 to 0 as pairs are learnt, and a gradient norm that falls with it is no cause for alarm
- kl: log π_ref - log π per token of both responses, an estimate of KL(reference ‖ policy) as far as responses
  are what the reference would say
- length_difference: tokens of chosen minus tokens of rejected
- longer_favoured: pairs whose margin favours the longer response; near 1 the policy learns length
"""


def dpo_objective(loss: LossConfig) -> Objective:
    """The objective of a DPO run."""
    return Objective(
        lambda chunk, batch: packed_losses(chunk, batch, loss),
        lambda output, batch: reduce_pairs(output, batch, loss),
        STATISTICS,
        shown=("rewards/accuracies", "rewards/margins"),
    )


def packed_losses(chunk: nn.Module, batch: Batch, loss: LossConfig | None = None) -> Tensor:
    """A row through the model: -log-probs [1, s] on the last stage, 0 where nothing counts.

    With `loss` the head is told how pairs will be weighted, and makes its gradients pair by pair in its
    forward; the caller then promises to take `reduce_pairs` of the same.
    """
    weights = None
    if loss is not None and batch["pairs"] and torch.is_grad_enabled():
        weights = dpo_token_weights(
            batch["cu_seqlens"][: 2 * batch["pairs"] + 1].tolist(),
            batch["tokens"].numel(),
            mask=batch["loss_mask"].flatten() != 0,
            **_options(batch, loss),
        )
    return chunk(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=Weighing(batch["loss_mask"], weights),
        packed_seq_params=packing_of(batch),
    )


def _options(batch: Batch, loss: LossConfig) -> dict[str, Any]:
    return dict(
        reference_logps=None if loss.reference_free else batch["reference"],
        variant=loss.variant,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        rpo_alpha=batch["rpo_weight"],
        rpo_mean=loss.rpo_mean,
    )


def loss_offsets(batch: Batch, device: torch.device) -> Tensor:
    """[2 P + 1] int32: where each response's sequence begins and the last ends, padding left out."""
    return batch["cu_seqlens"][: 2 * batch["pairs"] + 1].to(device)


def pair_loss(output: Tensor, batch: Batch, loss: LossConfig) -> DPOLoss:
    """The loss of one row with at least one pair."""
    return dpo_loss(
        -output.flatten(),
        loss_offsets(batch, output.device),
        mask=batch["loss_mask"].flatten() != 0,
        **_options(batch, loss),
    )


def reduce_pairs(output: Tensor, batch: Batch, loss: LossConfig) -> Reduced:
    """Sums over the pairs of a row; zeros for a row without pairs."""
    pairs = batch["pairs"]
    if pairs == 0:
        zero = output.flatten()[0] * 0.0  # its gradient is 0, and exists
        return Reduced(zero, zero.detach(), (zero.detach(),) * len(STATISTICS))
    seen = pair_loss(output, batch, loss)
    count = torch.tensor(float(pairs), device=output.device)
    return Reduced(seen.loss * pairs, count, _statistics(seen, batch["reference"]))


def _statistics(seen: DPOLoss, reference: Tensor) -> tuple[Tensor, ...]:
    counts = seen.counts.double().clamp(min=1)
    chosen, rejected = seen.sums[0::2], seen.sums[1::2]
    longer = counts[0::2] - counts[1::2]
    values = (
        seen.chosen_rewards,
        seen.rejected_rewards,
        seen.accuracies,
        seen.margins,
        chosen,
        rejected,
        seen.losses,
        -chosen / counts[0::2],
        torch.sigmoid(-seen.margins),
        ((reference - seen.sums) / counts).view(-1, 2).mean(1),
        longer,
        (seen.margins * longer > 0),
    )
    return tuple(value.double().sum() for value in values)


def loss_at_reference(loss: LossConfig) -> float:
    """The loss of a pair for which policy and reference agree, without the likelihood term: ln 2 for DPO."""
    even = torch.zeros(2, dtype=torch.float64)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32)
    seen = dpo_loss_reference(
        even, ends, None, even, None, loss.variant, loss.beta, loss.label_smoothing, 0.0, loss.rpo_mean
    )
    return float(seen.losses)
