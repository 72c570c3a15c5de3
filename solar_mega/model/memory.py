"""Bytes on a rank while it trains: weights, gradients, optimizer, activations.

weights      2 bytes an element in bf16, 4 in fp32
gradients    4 (the buffers are fp32)
optimizer    12 in bf16 (master weight and two moments), 8 in fp32; divided over the data-parallel ranks
             by the distributed optimizer
activations  activations.py
"""

from dataclasses import dataclass

from solar_mega.model.activations import (
    ELEMENT,
    Shape,
    head_bytes,
    in_flight,
    stage_saved,
    working_bytes,
)
from solar_mega.model.buffers import bucket_size, buffer
from solar_mega.model.parameters import stage_weights

_GRADIENT = 4
_OPTIMIZER = {"fp32": 8, "bf16": 12}


@dataclass(frozen=True)
class StageMemory:
    """The fullest rank of one pipeline stage; bytes."""

    parameters: int
    """Elements of weights on one rank, not bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Saved for the backward, all micro-batches in flight."""

    head: int
    """Logits and the head's early gradients; 0 but on the last stage."""

    working: int
    """Temporaries of a layer's backward: an estimate."""

    in_flight: int
    """Chunks of micro-batches held at once."""

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        # The head's backward is over before a layer's begins.
        return self.state + self.activations + max(self.head, self.working)


def stage_memory(shape: Shape, dp: int, pp_rank: int, dp_rank: int | None = None) -> StageMemory:
    """Memory of the ranks of pipeline stage `pp_rank` with `dp` replicas.

    Args:
        dp_rank: for that rank's share of the optimizer; None for the largest.
    """
    parallel, precision = shape.parallel, shape.train.precision
    micro_batches = shape.train.global_batch_size // (shape.train.micro_batch_size * dp)
    chunks = stage_weights(shape.arch, parallel, pp_rank)
    distributed = parallel.distributed_optimizer
    buffers = [
        buffer(weights, dp, distributed, bucket_size(parallel, dp) if (pp_rank, index) == (0, 0) else None)
        for index, weights in enumerate(chunks)
    ]
    shares = [sum(each) for each in zip(*(one.shares for one in buffers), strict=True)]
    parameters = sum(weight.elements for weights in chunks for weight in weights)
    padded = sum(one.elements for one in buffers)
    last = pp_rank == parallel.pp - 1
    return StageMemory(
        parameters=parameters,
        weights=padded * ELEMENT[precision],
        gradients=padded * _GRADIENT,
        optimizer=(max(shares) if dp_rank is None else shares[dp_rank]) * _OPTIMIZER[precision],
        activations=stage_saved(shape, max(1, micro_batches), pp_rank),
        head=head_bytes(shape) if last else 0,
        working=working_bytes(shape),
        in_flight=in_flight(parallel, max(1, micro_batches), pp_rank),
    )
