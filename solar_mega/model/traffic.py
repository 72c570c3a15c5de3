"""Bytes that a rank sends in one optimizer step, by kind of parallelism, and FLOPs by pipeline stage.

With S = s b h e bytes (one micro-batch's hidden states), t = tp, and rings that send (n - 1) / n of the data
once for a gather or a scatter and twice for an all-reduce:

    tensor      a layer: 2 all-reduces forward, 2 backward       8 (t - 1) / t S
                with sequence parallelism gathers and scatters, and the inputs gathered again for the weight
                gradients                                        10 (t - 1) / t S
                recomputation repeats the forward's              + 4 (t - 1) / t S
                embedding, head                                  2 (t - 1) / t S each
    pipeline    S / u to each neighbour, per chunk boundary and direction
    data        gradients fp32 reduce-scattered, weights gathered: (4 + e) (d - 1) / d per element of the
                buffers; without the distributed optimizer an all-reduce, 8 (d - 1) / d
    embedding   copies of a tied embedding on first and last stage, all-reduced
"""

from dataclasses import dataclass

from solar_mega.model.activations import Shape
from solar_mega.model.buffers import buffer
from solar_mega.model.parameters import stage_weights

RECOMPUTED = {"none": 0.0, "selective": 0.0, "full": 1.0}
"""Forward passes of a layer that its backward repeats. The attention kernels recompute their scores anyway,
so `selective` repeats a core attention, a few hundredths of a layer, which is left out here."""


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a rank of one stage per optimizer step."""

    tensor: float
    pipeline: float
    gradients: float
    """Data-parallel reduction."""
    weights: float
    """Data-parallel gather of updated weights."""
    embedding: float


def stage_traffic(shape: Shape, dp: int, pp_rank: int) -> Traffic:
    """Traffic of a rank of pipeline stage `pp_rank`."""
    parallel, arch = shape.parallel, shape.arch
    tp, pp, vpp = parallel.tp, parallel.pp, parallel.vpp
    micro_batches = shape.train.global_batch_size / (shape.train.micro_batch_size * dp)
    hidden = shape.tokens * arch.hidden_size * shape.element
    ring = (tp - 1) / tp * hidden
    per_layer = (10 if parallel.sequence_parallel else 8) + 4 * RECOMPUTED[shape.train.recompute]
    ends = (2 if pp_rank == 0 else 0) + (2 if pp_rank == pp - 1 else 0)
    tensor = micro_batches * ring * (arch.num_layers / pp * per_layer + ends)

    # Forward to the next chunk and backward to the one before; the very first and last have one side only.
    boundaries = 2 * vpp - (1 if pp_rank == 0 else 0) - (1 if pp_rank == pp - 1 else 0) if pp > 1 else 0
    pipeline = micro_batches * boundaries * shape.hidden_bytes

    chunks = stage_weights(arch, parallel, pp_rank)
    distributed = parallel.distributed_optimizer
    elements = sum(buffer(weights, dp, distributed).elements for weights in chunks)
    share = (dp - 1) / dp * elements
    gradients, weights = (4 * share, shape.element * share) if distributed else (8 * share, 0.0)
    copies = [weight.elements for chunk in chunks for weight in chunk if weight.shared]
    return Traffic(tensor, pipeline, gradients, weights, 4.0 * sum(copies))


def stage_flops(shape: Shape, pp_rank: int) -> float:
    """FLOPs of one micro-batch on all tensor-parallel ranks of a stage, forward and backward, recomputation
    included."""
    arch = shape.arch
    matrices = 6 * (arch.layer_parameters() - 2 * arch.hidden_size)
    attention = 12 * arch.num_attention_heads * arch.head_dim * shape.train.seq_length / 2
    again = 1 + RECOMPUTED[shape.train.recompute] / 3
    layers = arch.num_layers / shape.parallel.pp * (matrices + attention) * again
    head = 6 * arch.vocab_size * arch.hidden_size if pp_rank == shape.parallel.pp - 1 else 0
    return shape.tokens * (layers + head)
