"""The language model's head: losses from hidden states through this project's ops, or logits.

Shapes:  s sequence, b batch, h hidden (per rank s/tp with sequence parallelism), V/tp columns of this rank.
"""

from typing import NamedTuple

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from solar_mega.config.schema import KernelConfig
from solar_mega.ops import WeightsOf, linear_token_logprob, token_logprob


class Weighing(NamedTuple):
    """In place of a loss mask, for losses that are no weighted sum over tokens."""

    mask: Tensor
    """[b, s], 0 for tokens that do not count: their losses are 0."""

    weights: WeightsOf | None = None
    """What the loss's gradient by the log-probs will be, times any number; positions are those of s * b
    flattened. None promises nothing."""


class LossHead(ColumnParallelLinear):
    """Megatron's output layer, which can also be asked for losses.

    A call of the module, not a function beside it: distributed data parallelism waits for the weights it
    gathers in hooks that run before a module's forward.
    """

    kernels: KernelConfig

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output=None, losses=None):
        """input_ [s, b, h] -> (logits [s, b, V/tp], None); with `losses` = (labels, a loss mask, Weighing or
        None), all [b, s], -> losses [b, s] fp32."""
        if losses is None:
            return super().forward(input_, weight, runtime_gather_output)
        labels, given = losses
        labels, mask, counted, weights = labels.transpose(0, 1).contiguous(), None, None, None
        if given is not None:
            mask = given.mask if isinstance(given, Weighing) else given
            mask = mask.transpose(0, 1).contiguous()
            counted, weights = mask != 0, given.weights if isinstance(given, Weighing) else -mask
        limit = self.kernels.loss_logits_mib * 2**20
        if limit == 0:
            logits, _ = super().forward(input_, weight)
            logps = token_logprob(logits, labels, tp_group=self.tp_group, mask=counted, inplace_backward=True)
        else:
            logps = linear_token_logprob(
                input_,
                self.weight if weight is None else weight,
                labels,
                tp_group=self.tp_group,
                sequence_parallel=self.sequence_parallel,
                mask=counted,
                token_weights=weights,
                max_logits_bytes=limit,
            )
        return -logps.transpose(0, 1).contiguous()


class SolarGPT(GPTModel):
    """megatron-core's GPT model with `LossHead` for its output layer; `arch` is its `Architecture`.

    Called with `labels` it returns losses [b, s]. With `loss_mask` [b, s] as well the caller promises to take
    (losses * loss_mask).sum(), times any number: masked tokens then have loss 0, and the head's gradients are
    made in its forward (`linear_token_logprob`'s token_weights). Without, anything may be done with losses; a
    `Weighing` in its place says what will be.
    """

    def __init__(self, *args, kernels: KernelConfig, **options) -> None:
        super().__init__(*args, **options)
        self.kernels = kernels
        if self.post_process:
            self.output_layer.__class__ = LossHead
            self.output_layer.kernels = kernels

    def _postprocess(self, hidden_states: Tensor, *args, labels=None, loss_mask=None, **options):
        if labels is None or not self.post_process or self.kernels.token_loss == "reference":
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **options)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, tied, losses=(labels, loss_mask))
