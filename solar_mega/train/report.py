"""What a run says about itself: the console line, metrics.jsonl, and trackers where they are asked for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from solar_mega.config.schema import TrainConfig
from solar_mega.runtime.console import human_bytes, human_count, human_seconds, say
from solar_mega.runtime.trackers import Sink
from solar_mega.train.step import Evaluation, StepResult
from solar_mega.train.work import Work

MEASURED = (
    "seconds",
    "tokens_per_second",
    "data_wait_seconds",
    "save_seconds",
    "memory_bytes",
    "memory_peak_bytes",
    "memory_reserved_bytes",
    "slowest_rank",
    "slowest_over_median",
)
"""Columns of the metrics that two runs of the same do not share."""


class Report:
    """Console line and metrics. Validation and saving are not training time."""

    def __init__(
        self,
        work: Work,
        config: TrainConfig,
        metrics: Sink | None,
        first_step: int,
        shown: tuple[str, ...],
    ) -> None:
        self.work, self.config, self.metrics, self.shown = work, config, metrics, shown
        self.started = self.line_time = time.perf_counter()
        self.first_step = self.line_step = first_step
        self.line_wait = self.last_wait = 0.0
        self.last_time = self.started
        self.training_seconds = self.save_seconds = 0.0
        self.memory = MemoryGauge()

    def step(self, step: int, result: StepResult, wait: float, extra: dict[str, float]) -> None:
        """`wait`: seconds waited for data since the beginning; `extra`: more columns of the metrics."""
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
                **self.memory.read(),
                **result.statistics,
                **extra,
            }
            if self.save_seconds:  # of the save before this step
                row["save_seconds"] = round(self.save_seconds, 6)
            self.metrics.write(row)
        self.save_seconds = 0.0
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

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What a save holds the training up goes into the next step's row."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self.last_time += took
        self.line_time += took
        # Asking whether a save is done takes microseconds, every step.
        self.save_seconds = took if took > 1e-3 else 0.0

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
            f"{per_rank / 1e12:.3g} TFLOP/s  MFU {mfu}  mem {human_bytes(self.memory.peak())}  "
            f"wait {waited:.1%}  ETA {human_seconds(left)}"
        )
        self.line_time, self.line_step, self.line_wait = now, step, wait


class MemoryGauge:
    """Memory of this rank: the GPU allocator's, or the process's resident set."""

    def __init__(self) -> None:
        self.process, self._peak = None, 0
        if not torch.cuda.is_available():
            import psutil

            self.process = psutil.Process()

    def read(self) -> dict[str, int]:
        """Columns of the metrics, in bytes: what is held now and, on a GPU, most since the last reading."""
        if self.process is not None:
            return {"memory_bytes": self.process.memory_info().rss}
        columns = {
            "memory_bytes": torch.cuda.memory_allocated(),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(),
            "memory_reserved_bytes": torch.cuda.memory_reserved(),
        }
        self._peak = max(self._peak, columns["memory_peak_bytes"])
        torch.cuda.reset_peak_memory_stats()
        return columns

    def peak(self) -> int:
        """Most held so far on a GPU; the resident set of now on a CPU."""
        if self.process is not None:
            return self.process.memory_info().rss
        return max(self._peak, torch.cuda.max_memory_allocated())
