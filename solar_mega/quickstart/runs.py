"""The five runs of the quickstart, read back from their metrics."""

from dataclasses import dataclass
from pathlib import Path

from solar_mega.errors import UserError
from solar_mega.runtime.metrics import read_metrics


@dataclass(frozen=True)
class Curve:
    """Validation losses of one run; tokens and FLOPs counted from its own beginning."""

    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    val_loss: tuple[float, ...]
    tokens_per_second: float

    @property
    def start(self) -> float:
        return self.val_loss[0]

    @property
    def end(self) -> float:
        return self.val_loss[-1]

    def tokens_to_reach(self, loss: float) -> int | None:
        """Tokens at the first validation at or below `loss`; None when the run never gets there."""
        return next((t for t, v in zip(self.tokens, self.val_loss, strict=True) if v <= loss), None)


@dataclass(frozen=True)
class Runs:
    base: Curve
    grown: Curve
    """dus:2, the paper's depthwise scaling."""
    stack: Curve
    """Plain doubling."""
    continued: Curve
    """The base simply trained on."""
    scratch: Curve
    """The grown depth from random weights."""


def read_runs(root: Path) -> Runs:
    """Raises UserError naming every run that has not finished."""
    names = ("base", "grown", "stack", "continued", "scratch")
    missing = [name for name in names if not (root / name / "hf" / "config.json").is_file()]
    if missing:
        raise UserError(f"{root}: no finished run {', '.join(missing)}; bash launch/quickstart.sh makes them")
    return Runs(**{name: _curve(root / name / "metrics.jsonl") for name in names})


def _curve(path: Path) -> Curve:
    rows = list(read_metrics(path))
    valid = [row for row in rows if "val_loss" in row]
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return Curve(
        tokens=tuple(row["tokens"] for row in valid),
        flops=tuple(row["flops"] for row in valid),
        val_loss=tuple(row["val_loss"] for row in valid),
        tokens_per_second=rates[len(rates) // 2],
    )
