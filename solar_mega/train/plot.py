"""`solar-mega plot RUN...`: runs beside each other, from their metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes
from solar_mega.runtime.drawing import OTHERS, OURS, figure, tidy
from solar_mega.runtime.metrics import read_metrics

Axis = Literal["step", "tokens", "flops", "hours"]
_X = {
    "step": ("step", 1.0, "optimizer steps"),
    "tokens": ("tokens", 1.0, "tokens"),
    "flops": ("flops", 1e18, "training compute, EFLOP"),
    "hours": ("hours", 1.0, "hours of training"),
}
_UNITS = ((1e9, ", billion"), (1e6, ", million"), (1e3, ", thousand"), (1.0, ""))


@dataclass(frozen=True)
class Run:
    name: str
    rows: list[dict[str, Any]]
    """Of the training steps, each with `hours` of training so far."""
    validations: list[dict[str, Any]]


def load(paths: Sequence[Path]) -> list[Run]:
    """Raises UserError for a directory without metrics."""
    runs = []
    for path in paths:
        file = path / "metrics.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path}: no metrics.jsonl there; give a run's output.dir, or its metrics file")
        rows, validations, hours = [], [], 0.0
        for row in read_metrics(file):
            hours += row.get("seconds", 0.0) / 3600
            (validations if "val_loss" in row else rows).append({**row, "hours": hours})
        if not any("loss" in row for row in rows):
            raise UserError(f"{file} holds no training step yet")
        runs.append(Run(file.parent.name, [row for row in rows if "loss" in row], validations))
    return _distinguished(runs, paths)


def _distinguished(runs: list[Run], paths: Sequence[Path]) -> list[Run]:
    """Runs of one name are told apart by their paths."""
    names = [run.name for run in runs]
    return [
        Run(str(path) if names.count(run.name) > 1 else run.name, run.rows, run.validations)
        for run, path in zip(runs, paths, strict=True)
    ]


def _axis(runs: Sequence[Run], x: Axis) -> tuple[str, float, str]:
    """Key of the metrics, what it is divided by, label: tokens in the unit that fits the longest run."""
    key, scale, label = _X[x]
    if x != "tokens":
        return key, scale, label
    most = max(row["tokens"] for run in runs for row in run.rows)
    scale, unit = next((s, name) for s, name in _UNITS if most >= s or s == 1.0)
    return key, scale, label + unit


def draw(runs: Sequence[Run], path: Path, x: Axis = "tokens", smooth: int = 1) -> None:
    """Loss (thin) and validation loss (thick), gradient norm, tokens per second, memory.

    Args:
        smooth: steps averaged in all but the validation loss.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    key, scale, label = _axis(runs, x)
    with figure(path, 2, 2, figsize=(11.5, 7.2), sharex=True) as (_, axes):
        (losses, norms), (rates, memory) = axes
        for run, colour in zip(runs, (OURS, *OTHERS * 8), strict=False):
            at = [row[key] / scale for row in run.rows]
            thin = {"color": colour, "linewidth": 0.9, "alpha": 0.55 if run.validations else 1.0}
            losses.plot(at, _mean(run.rows, "loss", smooth), **thin)
            losses.plot(
                [row[key] / scale for row in run.validations],
                [row["val_loss"] for row in run.validations],
                color=colour,
                linewidth=2.0,
                marker="." if len(run.validations) < 25 else None,
                label=run.name,
            )
            plain = {"color": colour, "linewidth": 1.2}
            norms.plot(at, _mean(run.rows, "grad_norm", smooth), **plain)
            rates.plot(at, _mean(run.rows, "tokens_per_second", smooth), **plain)
            memory.plot(at, [value / 1e9 for value in _mean(run.rows, "memory_bytes", 1)], **plain)
        for axis, title in zip(axes.flat, _TITLES, strict=True):
            axis.set_title(title, fontsize=10)
            tidy(axis)
        norms.set_yscale("log")
        norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        norms.yaxis.set_major_formatter("{x:g}")
        norms.yaxis.set_minor_formatter(NullFormatter())
        for axis in (rates, memory):
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
        losses.legend(frameon=False, fontsize=9)


_TITLES = (
    "loss, nats per token (thick: validation)",
    "gradient norm before clipping",
    "tokens per second",
    "memory of rank 0, GB",
)


def _mean(rows: Sequence[dict[str, Any]], name: str, over: int) -> list[float]:
    """Running mean of the last `over` values; nan where a row has none."""
    values = [float(row.get(name, float("nan"))) for row in rows]
    if over <= 1:
        return values
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - over) : end]
        means.append(sum(part) / len(part))
    return means


def summary(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A line for each run: steps, last and best losses, speed, memory."""
    lines = []
    for run in runs:
        last = run.rows[-1]
        best = min((row["val_loss"] for row in run.validations), default=float("nan"))
        rate = sorted(row["tokens_per_second"] for row in run.rows)[len(run.rows) // 2]
        peak = max(row.get("memory_peak_bytes", row.get("memory_bytes", 0)) for row in run.rows)
        lines.append(
            (
                run.name,
                str(last["step"]),
                f"{last['loss']:.4f}",
                f"{best:.4f}",
                f"{rate:.0f}",
                human_bytes(peak),
            )
        )
    return lines
