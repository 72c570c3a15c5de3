"""The training loop every stage shares: step, report, validate, save, stop when asked.

The stage brings a Trainer (model, optimizer, loss) and data indexed by consumed samples; step k consumes
samples [k * global_batch_size, (k + 1) * global_batch_size), so a resumed run under another layout sees the
same data.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from solar_mega.config.schema import CheckpointConfig, TrainConfig
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say
from solar_mega.runtime.signals import StopRequest
from solar_mega.runtime.trackers import Sink
from solar_mega.runtime.watchdog import Watchdog
from solar_mega.train.guards import FiniteGuard, Locate, SpikeGuard, Stopwatch, Stragglers
from solar_mega.train.report import Report
from solar_mega.train.step import Batch, Evaluation, Trainer
from solar_mega.train.tracing import Tracing
from solar_mega.train.work import Work

__all__ = ["Feed", "Outcome", "Saves", "Surroundings", "Work", "train"]

_SAVE_ALLOWANCE = _FIRST_ALLOWANCE = 4.0
"""A save, or the first step, which compiles and connects, may take this many times `train.hang_seconds`."""


@dataclass(frozen=True)
class Feed:
    """Where the loop gets its micro-batches."""

    train: Iterator[Batch]
    """From the first sample not yet consumed, micro-batch by micro-batch of this data-parallel rank."""

    validation: Callable[[], Iterator[Batch]] | None
    """A fresh pass over the fixed validation samples; None turns validation off."""

    train_micro_batches: int | Callable[[int], int]
    """Of this rank in a step; a function of the step, counted from 1, where steps differ."""
    validation_micro_batches: int

    wait_seconds: Callable[[], float]
    """Total time the loop has waited for training data."""

    validated: Callable[[int, Evaluation], None] | None = None
    """Called on every rank with the step and the result of each validation. Collective."""

    locate: Locate | None = None
    """Where a sample of the run lies in the data, for reports."""

    def micro_batches(self, step: int) -> int:
        given = self.train_micro_batches
        return given(step) if callable(given) else given


class Saves(Protocol):
    """How the loop saves; all of it is collective."""

    def save(self, step: int) -> None:
        """Saves the state after `step` steps, or begins to."""

    def save_last(self, step: int) -> None:
        """The same, complete when it returns."""

    def poll(self) -> None:
        """Between saves, every step."""


@dataclass(frozen=True)
class Outcome:
    step: int
    stopped_by: str | None
    """Signal that ended the run early, or None when it finished."""


@dataclass(frozen=True)
class Surroundings:
    """What the loop is given beside model, data and settings."""

    saves: Saves

    metrics: Sink | None = None
    """Rank 0's; None elsewhere."""

    directory: Path | None = None
    """Where reports of trouble and traces go; None writes none."""


def train(
    trainer: Trainer,
    feed: Feed,
    work: Work,
    config: TrainConfig,
    checkpoint: CheckpointConfig,
    around: Surroundings,
    first_step: int = 0,
) -> Outcome:
    """Run steps `first_step` + 1 .. `config.steps`. Collective.

    A step is validated before it is saved, so that a run resumed from it has the validation in its metrics.
    Saves every `checkpoint.interval`, by the clock, at the end, and on a signal, which ends the run.

    Raises:
        NotFinite: loss or gradient. The update was not made and the last checkpoint stands.
    """
    report = Report(work, config, around.metrics, first_step, trainer.objective.shown)
    finite = FiniteGuard(config, around.directory, feed.locate)
    spikes, stragglers = SpikeGuard(config, feed.locate), Stragglers(config)
    clock, tracing = _Clock(checkpoint.interval_minutes), Tracing(config.profile, around.directory)
    with StopRequest() as stop, Watchdog(config.hang_seconds, around.directory) as dog, tracing:

        def validate(step: int) -> Evaluation | None:
            if feed.validation is None:
                return None
            samples = dog.along(feed.validation(), "validation")
            seen = trainer.evaluate(samples, feed.validation_micro_batches)
            if feed.validated is not None:
                feed.validated(step, seen)
            return seen

        if first_step == 0:
            report.validation(0, validate(0))
        dog.beat(f"step {first_step + 1}", allowance=_FIRST_ALLOWANCE)
        for step in range(first_step + 1, config.steps + 1):
            tracing.before(step)
            trainer.stopwatch = Stopwatch() if stragglers.due(step) else None
            result = trainer.step(feed.train, feed.micro_batches(step))
            finite.check(step, result, trainer)
            extra: dict[str, float] = {}
            if trainer.stopwatch is not None:
                extra |= stragglers.report(step, trainer.stopwatch.seconds())
            if result.updated and (spike := spikes.check(step, result.loss)) is not None:
                extra["loss_deviations"] = round(spike, 2)
            report.step(step, result, feed.wait_seconds(), extra)
            if step == first_step + 1:
                _shorten_timeouts(config)
            last = step == config.steps
            if last or (config.eval_interval and step % config.eval_interval == 0):
                report.validation(step, validate(step))
            asked, overdue = ranks.any_rank(stop.received is not None, clock.due())
            due = overdue or (checkpoint.interval and step % checkpoint.interval == 0)
            if asked or last or due:
                trainer.gather_weights()
            with report.saving():
                if asked or last or due:
                    dog.beat(f"saving step {step}", allowance=_SAVE_ALLOWANCE)
                if asked or last:
                    around.saves.save_last(step)
                elif due:
                    around.saves.save(step)
                    clock.restart()
                else:
                    around.saves.poll()
            dog.beat(f"step {step + 1}")
            if asked and not last:
                say(f"{stop.received or 'a signal on another rank'}: saved at step {step}, leaving")
                return Outcome(step, stop.received or "signal")
    return Outcome(config.steps, None)


def _shorten_timeouts(config: TrainConfig) -> None:
    """The first step compiles and connects, and may wait long for a slow node. From here on, a collective
    that outlasts the watchdog is lost."""
    if config.hang_seconds:
        ranks.set_timeout(config.hang_seconds * _SAVE_ALLOWANCE + 60.0)


class _Clock:
    """Is it time to save? Rank 0's watch decides."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60 if ranks.is_main() else 0.0
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return 0.0 < self.seconds <= time.monotonic() - self.since
