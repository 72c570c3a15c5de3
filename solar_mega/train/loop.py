"""The training loop every stage shares: step, report, validate, save, stop when asked.

The stage brings a Trainer (model, optimizer, loss) and data indexed by consumed samples; step k consumes
samples [k * global_batch_size, (k + 1) * global_batch_size), so a resumed run under another layout sees the
same data.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from solar_mega.config.schema import CheckpointConfig, TrainConfig
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_bytes, human_count, human_seconds, say
from solar_mega.runtime.metrics import MetricsWriter
from solar_mega.runtime.signals import StopRequest
from solar_mega.train.step import Batch, Evaluation, StepResult, Trainer


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

    def micro_batches(self, step: int) -> int:
        given = self.train_micro_batches
        return given(step) if callable(given) else given


@dataclass(frozen=True)
class Work:
    """What a step costs, for the console and metrics."""

    tokens_per_step: int
    flops_per_token: float
    world: int
    peak_flops: float | None
    """Of one GPU in the run's precision, FLOP/s; None where it is not known."""


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


def train(
    trainer: Trainer,
    feed: Feed,
    work: Work,
    config: TrainConfig,
    checkpoint: CheckpointConfig,
    metrics: MetricsWriter | None,
    saves: Saves,
    first_step: int = 0,
) -> Outcome:
    """Run steps `first_step` + 1 .. `config.steps`. Collective.

    A step is validated before it is saved, so that a run resumed from it has the validation in its metrics.

    Args:
        saves: asked to save every `checkpoint.interval`, at the end, and on a signal.
        metrics: rank 0's writer, None elsewhere.

    Raises:
        UserError: loss or gradient not finite. The update was not made and the last checkpoint stands.
    """
    report = _Report(work, config, metrics, first_step, trainer.objective.shown)
    clock = _Clock(checkpoint.interval_minutes)
    with StopRequest() as stop:
        if first_step == 0:
            report.validation(0, _validate(trainer, feed, 0))
        for step in range(first_step + 1, config.steps + 1):
            result = trainer.step(feed.train, feed.micro_batches(step))
            if not result.updated:
                _refuse(step, result, config)
            report.step(step, result, feed.wait_seconds())
            last = step == config.steps
            if last or (config.eval_interval and step % config.eval_interval == 0):
                report.validation(step, _validate(trainer, feed, step))
            asked, overdue = ranks.any_rank(stop.received is not None, clock.due())
            if asked or last:
                saves.save_last(step)
            elif overdue or (checkpoint.interval and step % checkpoint.interval == 0):
                saves.save(step)
                clock.restart()
            else:
                saves.poll()
            if asked and not last:
                say(f"{stop.received or 'a signal on another rank'}: saved at step {step}, leaving")
                return Outcome(step, stop.received or "signal")
    return Outcome(config.steps, None)


class _Clock:
    """Is it time to save? Rank 0's watch decides."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60 if ranks.is_main() else 0.0
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return 0.0 < self.seconds <= time.monotonic() - self.since


def _validate(trainer: Trainer, feed: Feed, step: int) -> Evaluation | None:
    if feed.validation is None:
        return None
    seen = trainer.evaluate(feed.validation(), feed.validation_micro_batches)
    if feed.validated is not None:
        feed.validated(step, seen)
    return seen


def _refuse(step: int, result: StepResult, config: TrainConfig) -> None:
    first = (step - 1) * config.global_batch_size
    raise UserError(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so the weights were "
        f"not updated. The batch was samples {first} to {first + config.global_batch_size - 1} of the "
        "training data. Lower optimizer.lr, lengthen schedule.warmup_steps, or look at those samples; the "
        "last checkpoint is intact"
    )


class _Report:
    """Console line and metrics.jsonl."""

    def __init__(
        self,
        work: Work,
        config: TrainConfig,
        metrics: MetricsWriter | None,
        first_step: int,
        shown: tuple[str, ...],
    ) -> None:
        self.work, self.config, self.metrics, self.shown = work, config, metrics, shown
        self.started = self.line_time = time.perf_counter()
        self.first_step = self.line_step = first_step
        self.line_wait = self.last_wait = 0.0
        self.last_time = self.started
        self.training_seconds = 0.0

    def step(self, step: int, result: StepResult, wait: float) -> None:
        now = time.perf_counter()
        seconds, self.last_time = now - self.last_time, now
        self.training_seconds += seconds
        tokens = self.work.tokens_per_step
        if self.metrics is not None:
            row = {
                "step": step,
                "tokens": step * tokens,
                "flops": step * tokens * self.work.flops_per_token,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "seconds": round(seconds, 6),
                "tokens_per_second": round(tokens / seconds, 3),
                "data_wait_seconds": round(wait - self.last_wait, 6),
                **result.statistics,
            }
            self.metrics.write(row)
        self.last_wait = wait
        if step % self.config.log_interval == 0 or step == self.config.steps or step == self.first_step + 1:
            self._line(step, result, wait, now)

    def validation(self, step: int, seen: Evaluation | None) -> None:
        now = time.perf_counter()
        paused, self.last_time = now - self.last_time, now
        self.line_time += paused  # validation is not training time
        if seen is None:
            return
        beside = self._beside(seen.statistics)
        say(f"step {step:>6}  validation loss {seen.loss:.4f}{beside}   ({human_seconds(paused)})")
        if self.metrics is not None:
            tokens = step * self.work.tokens_per_step
            row = {"step": step, "tokens": tokens, "flops": tokens * self.work.flops_per_token}
            row |= {"val_loss": seen.loss} | {f"val_{name}": mean for name, mean in seen.statistics.items()}
            self.metrics.write(row)

    def _beside(self, statistics: dict[str, float]) -> str:
        return "".join(f"  {name} {statistics[name]:.4f}" for name in self.shown)

    def _line(self, step: int, result: StepResult, wait: float, now: float) -> None:
        seconds = max(now - self.line_time, 1e-9)
        rate = (step - self.line_step) * self.work.tokens_per_step / seconds
        waited = (wait - self.line_wait) / seconds
        per_step = self.training_seconds / (step - self.first_step)
        per_rank = rate * self.work.flops_per_token / self.work.world
        mfu = "n/a" if self.work.peak_flops is None else f"{per_rank / self.work.peak_flops:.1%}"
        left = per_step * (self.config.steps - step)
        say(
            f"step {step:>6}/{self.config.steps} {step / self.config.steps:>4.0%}  loss {result.loss:.4f}"
            f"{self._beside(result.statistics)}  gnorm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
            f"{human_count(rate)} tok/s ({human_count(rate / self.work.world)}/rank)  "
            f"{per_rank / 1e12:.3g} TFLOP/s  MFU {mfu}  mem {human_bytes(_memory())}  "
            f"wait {waited:.1%}  ETA {human_seconds(left)}"
        )
        self.line_time, self.line_step, self.line_wait = now, step, wait


def _memory() -> int:
    """Bytes: peak of the GPU's allocator, or this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
