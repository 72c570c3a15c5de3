"""Bytes that a training step keeps for its backward pass, and the most it needs on top while it works.

Per layer and micro-batch of T = s b tokens, e bytes an element, t = tp, u = t with sequence parallelism and 1
without (the parts of the layer that tensor parallelism does not split):

    norm in, norm out        2 h / u      residual, norm out     2 h / u      fp32 1/rms      2 * 4 / u
    q, k, v                  (n + 2 g) d / t                     gate and up             2 f / t
    attention out            n d / t                             activation              f / t
    softmax statistics       8 n / t (CPU op) or 4 n / t bytes

times T e (bytes where it says so). Scores do not exist: the attention op recomputes them. With full
recomputation a layer keeps its input alone, h / u.

A stage holds as many micro-batches as its schedule runs ahead (`in_flight`): pp - p of them in 1F1B, in the
interleaved schedule 2 (pp - p - 1) + (vpp - 1) pp + 1 chunks of L / (pp vpp) layers.
"""

import math
from dataclasses import dataclass

from solar_mega.config.schema import KernelConfig, ParallelConfig, TrainConfig
from solar_mega.model.architecture import Architecture

ELEMENT = {"fp32": 4, "bf16": 2}
"""Bytes of a weight or activation by `train.precision`."""

_BATCH_BYTES = 8 + 8 + 8 + 4
"""Per token: tokens, labels, positions, loss mask."""

_LOSS_BYTES = 8 + 1 + 4
"""Per token of the loss: labels, mask and weights in the order of the hidden states."""


@dataclass(frozen=True)
class Shape:
    """What activations depend on."""

    arch: Architecture
    parallel: ParallelConfig
    train: TrainConfig
    kernels: KernelConfig
    cuda: bool = True
    """On a GPU, else on a CPU: they save attention's statistics differently."""

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.train.seq_length * self.train.micro_batch_size

    @property
    def element(self) -> int:
        return ELEMENT[self.train.precision]

    @property
    def unsplit(self) -> int:
        """How many ways norms and residuals are split."""
        return self.parallel.tp if self.parallel.sequence_parallel else 1

    @property
    def hidden_bytes(self) -> int:
        """Of one tensor [s, b, h] as norms and residuals see it."""
        return self.tokens * self.arch.hidden_size * self.element // self.unsplit


def layer_saved(shape: Shape) -> int:
    """Bytes that one layer saves for the backward of one micro-batch, nothing recomputed but what the kernels
    recompute themselves."""
    arch, tp, tokens = shape.arch, shape.parallel.tp, shape.tokens
    heads, d = arch.num_attention_heads, arch.head_dim
    norms = 4 * shape.hidden_bytes + 2 * 4 * tokens // shape.unsplit
    split = (2 * heads + 2 * arch.num_query_groups) * d + 3 * arch.ffn_hidden_size
    return norms + tokens * shape.element * split // tp + _attention_extra(shape)


def _attention_extra(shape: Shape) -> int:
    """Bytes saved by core attention beside its input and output."""
    arch, tokens, heads = shape.arch, shape.tokens, shape.arch.num_attention_heads // shape.parallel.tp
    if shape.kernels.attention == "reference":
        if shape.train.recompute == "selective":
            return 0
        # Megatron's unfused softmax: scores and probabilities, and k and v repeated for every query head.
        repeated = 2 * tokens * heads * arch.head_dim * shape.element if _grouped(arch) else 0
        return 2 * tokens * shape.train.seq_length * heads * shape.element + repeated
    if shape.train.recompute == "selective":
        return 0
    on_cpu = not shape.cuda and shape.kernels.attention == "fused"
    statistics = (8 if on_cpu else 4) * tokens * heads
    # PyTorch's attention returns [b, n, s, d]; with more than one sample the layer's [s, b, n d] is a copy.
    copied = 0 if on_cpu or shape.train.micro_batch_size == 1 else tokens * heads * arch.head_dim
    return statistics + copied * shape.element


def _grouped(arch: Architecture) -> bool:
    return arch.num_query_groups != arch.num_attention_heads


def chunk_saved(shape: Shape, last: bool) -> int:
    """Bytes one chunk keeps for the backward of one micro-batch; `last`: the chunk with the head."""
    layers = shape.arch.num_layers // (shape.parallel.pp * shape.parallel.vpp)
    each = shape.hidden_bytes if shape.train.recompute == "full" else layer_saved(shape)
    batch = shape.tokens * _BATCH_BYTES
    if not last:
        # Without pipelining the output goes to the head; else it stays until its gradient has come.
        return layers * each + batch + shape.hidden_bytes
    norm = 2 * shape.hidden_bytes + 4 * shape.tokens // shape.unsplit
    return layers * each + batch + norm + shape.tokens * _LOSS_BYTES


def in_flight(parallel: ParallelConfig, micro_batches: int, pp_rank: int) -> int:
    """Chunks of micro-batches whose activations stage `pp_rank` holds at its worst moment."""
    if parallel.pp == 1:
        return 1
    if parallel.vpp == 1:
        return min(parallel.pp - pp_rank, micro_batches)
    ahead = 2 * (parallel.pp - pp_rank - 1) + (parallel.vpp - 1) * parallel.pp
    return min(ahead + 1, micro_batches * parallel.vpp)


def stage_saved(shape: Shape, micro_batches: int, pp_rank: int) -> int:
    """Bytes of activations on a rank of stage `pp_rank`, all micro-batches in flight."""
    count = in_flight(shape.parallel, micro_batches, pp_rank)
    if pp_rank != shape.parallel.pp - 1:
        return count * chunk_saved(shape, last=False)
    # The backward of the chunk with the head follows its forward at once: there is never a second one.
    return (count - 1) * chunk_saved(shape, last=shape.parallel.vpp == 1) + chunk_saved(shape, last=True)


def head_bytes(shape: Shape) -> int:
    """What the language-model head holds for one micro-batch on the last stage: logits, or with logits in
    pieces the gradients made in the forward."""
    tokens, columns = shape.tokens, shape.arch.vocab_size // shape.parallel.tp
    all_logits = tokens * columns * shape.element
    if shape.kernels.token_loss == "reference":
        return all_logits + 2 * 4 * tokens * columns  # fp32 logits and their exponentials
    limit = shape.kernels.loss_logits_mib * 2**20
    if limit == 0:
        return all_logits
    pieces = math.ceil(all_logits / limit)
    dweight = columns * shape.arch.hidden_size * (shape.element if pieces == 1 else 4)
    hidden = tokens * shape.arch.hidden_size * shape.element
    return min(limit, all_logits) + dweight + 2 * hidden


def working_bytes(shape: Shape) -> int:
    """The most a layer's backward needs beyond what was saved: gradients of the feed-forward layer's wide
    activations, the gathered sequence, one weight gradient, and under full recomputation the layer's own
    activations. An estimate from the order of operations; the allocator's rounding is not in it."""
    arch, tp, tokens, e = shape.arch, shape.parallel.tp, shape.tokens, shape.element
    wide = 3 * arch.ffn_hidden_size // tp * tokens * e
    whole = tokens * arch.hidden_size * e
    gathered = whole if shape.unsplit > 1 else 0
    dweight = 2 * arch.ffn_hidden_size // tp * arch.hidden_size * e
    again = layer_saved(shape) if shape.train.recompute == "full" else 0
    return wide + gathered + whole + 2 * shape.hidden_bytes + dweight + again
