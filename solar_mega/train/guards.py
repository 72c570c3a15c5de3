"""What watches over a training: batches that are not finite, losses that jump, slow ranks, lack of memory."""

import contextlib
import json
import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from solar_mega.config.schema import TrainConfig
from solar_mega.errors import NotFinite, OutOfMemory
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say
from solar_mega.runtime.files import atomic_file
from solar_mega.train.step import StepResult, Trainer

Locate = Callable[[int], dict[str, Any]]
"""Sample of the run -> where it lies in the data."""

_SHOWN = 8


def samples_of(step: int, config: TrainConfig) -> tuple[int, int]:
    """First and last sample of a step."""
    first = (step - 1) * config.global_batch_size
    return first, first + config.global_batch_size - 1


class FiniteGuard:
    """A step whose loss or gradient is not finite was not taken. It ends the run, or, as often as
    `train.skip_nonfinite` allows, is left out; either way a file says what the batch was."""

    def __init__(self, config: TrainConfig, directory: Path | None, locate: Locate | None) -> None:
        self.config, self.directory, self.locate = config, directory, locate
        self.skipped = 0

    def check(self, step: int, result: StepResult, trainer: Trainer) -> None:
        """Collective. Raises NotFinite when the step was not taken and may not be left out."""
        if result.updated:
            return
        first, last = samples_of(step, self.config)
        place = self._dump(step, result, trainer)
        text = (
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so the weights "
            f"were not updated. The batch was samples {first} to {last} of the training data"
            + (f" (details: {place})" if place else "")
        )
        if self.skipped < self.config.skip_nonfinite:
            self.skipped += 1
            say(f"{text}. Left out: {self.skipped} of train.skip_nonfinite = {self.config.skip_nonfinite}")
            return
        raise NotFinite(
            f"{text}. Lower optimizer.lr, lengthen schedule.warmup_steps, or look at those samples; the last "
            "checkpoint is intact"
        )

    def _dump(self, step: int, result: StepResult, trainer: Trainer) -> Path | None:
        """Which micro-batches had a loss, and which parameters a gradient, that is not finite."""
        parts = ranks.gather({"micro_batches": trainer.micro_batches(), "gradients": bad_gradients(trainer)})
        if not ranks.is_main() or self.directory is None:
            return None if self.directory is None else self._file(step)
        first, last = samples_of(step, self.config)
        bad = [
            {"rank": rank, **part}
            for rank, given in enumerate(parts)
            for part in given["micro_batches"]
            if not math.isfinite(part["loss_sum"])
        ]
        suspects = sorted({sample for part in bad for sample in part["samples"]}) or range(first, last + 1)
        content = {
            "step": step,
            "loss": str(result.loss),
            "gradient_norm": str(result.grad_norm),
            "samples": [first, last],
            "micro_batches_not_finite": [{**part, "loss_sum": str(part["loss_sum"])} for part in bad],
            "where": [self.locate(sample) for sample in suspects] if self.locate else None,
            "gradients_not_finite": {str(r): part["gradients"] for r, part in enumerate(parts)},
        }
        with atomic_file(self._file(step)) as stream:
            json.dump(content, stream, indent=1)
        return self._file(step)

    def _file(self, step: int) -> Path:
        return self.directory / f"nonfinite-step-{step:08d}.json"


def bad_gradients(trainer: Trainer) -> list[str]:
    """Names of this rank's parameters whose gradient is not finite, the first few."""
    names = []
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not torch.isfinite(gradient).all():
                names.append(name)
                if len(names) == _SHOWN:
                    return names
    return names


class SpikeGuard:
    """A loss far above those of the last steps, in deviations of theirs, gets a line naming its samples.

    Median and median absolute deviation: one spike must not hide the next.
    """

    WINDOW, LEAST = 64, 16

    def __init__(self, config: TrainConfig, locate: Locate | None) -> None:
        self.config, self.locate = config, locate
        self.losses: deque[float] = deque(maxlen=self.WINDOW)

    def check(self, step: int, loss: float) -> float | None:
        """Deviations above the median where that is a spike, else None."""
        recent, limit = list(self.losses), self.config.spike_deviations
        self.losses.append(loss)
        if not limit or len(recent) < self.LEAST:
            return None
        middle = statistics.median(recent)
        # 1.4826 makes it the standard deviation of normal noise; a flat loss is not infinitely steady.
        spread = 1.4826 * statistics.median(abs(value - middle) for value in recent)
        deviations = (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
        if not deviations > limit:
            return None
        first, last = samples_of(step, self.config)
        where = f"; the first of them: {self.locate(first)}" if self.locate else ""
        say(
            f"step {step}: loss {loss:.4f} is {deviations:.0f} deviations above the median of the last "
            f"{len(recent)} steps, {middle:.4f} (train.spike_deviations = {limit:g}). The batch was samples "
            f"{first} to {last}{where}"
        )
        return deviations


class Stragglers:
    """Every `train.straggler_interval` steps each rank's time in its forward passes, compared among the ranks
    of the same pipeline stage, which have the same work."""

    WORTH_A_LINE = 1.2

    def __init__(self, config: TrainConfig) -> None:
        self.interval = config.straggler_interval if ranks.world_size() > 1 else 0

    def due(self, step: int) -> bool:
        return bool(self.interval) and step % self.interval == 0

    def report(self, step: int, seconds: float) -> dict[str, float]:
        """Collective. What goes into the metrics; a line names the slowest rank if it is much slower."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        seen = ranks.gather((stage, seconds, socket.gethostname()))
        worst, rank = 1.0, 0
        for number, (mine, taken, _) in enumerate(seen):
            usual = statistics.median(other for at, other, _ in seen if at == mine)
            if usual > 0 and taken / usual > worst:
                worst, rank = taken / usual, number
        if worst > self.WORTH_A_LINE:
            say(
                f"step {step}: rank {rank} ({seen[rank][2]}) is {worst:.2f} x as slow as the median of its "
                f"pipeline stage, {1e3 * seen[rank][1]:.1f} ms in the step's forward passes"
            )
        return {"slowest_rank": rank, "slowest_over_median": round(worst, 4)}


class Stopwatch:
    """Time in blocks of this rank's own work: host time on a CPU, events on a GPU (read once, at the end)."""

    def __init__(self) -> None:
        self.seconds_on_host, self.events = 0.0, []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
            return
        begin = time.perf_counter()
        yield
        self.seconds_on_host += time.perf_counter() - begin

    def seconds(self) -> float:
        if self.events:
            torch.cuda.synchronize()
        return self.seconds_on_host + sum(begin.elapsed_time(end) for begin, end in self.events) / 1e3


@contextlib.contextmanager
def memory_guard(directory: Path) -> Iterator[None]:
    """Out of memory: a snapshot for https://pytorch.org/memory_viz on a GPU, and what to change.

    Raises OutOfMemory in place of what torch and Python raise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemory(
            f"rank {ranks.rank()} is out of memory: {said}{_snapshot(directory)}\n"
            "Lower train.micro_batch_size, set train.recompute, raise parallel.tp or parallel.pp, or set "
            "parallel.distributed_optimizer = true; solar-mega plan says what fits"
        ) from error


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _snapshot(directory: Path) -> str:
    if not torch.cuda.is_available():
        return ""
    file = directory / f"out-of-memory-rank-{ranks.rank():04d}.pickle"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))
    except Exception as failure:
        return f" (no snapshot: {failure})"
    return f" (snapshot: {file})"
