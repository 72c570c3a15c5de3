"""What a step costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a step costs, for the console and metrics."""

    tokens_per_step: int
    flops_per_token: float
    world: int
    peak_flops: float | None
    """Of one GPU in the run's precision, FLOP/s; None where it is not known."""
