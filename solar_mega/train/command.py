"""Command lines of the trainings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from solar_mega.config.command_line import RunOptions, parse_options, parse_run
from solar_mega.config.load import to_toml
from solar_mega.config.schema import PretrainConfig
from solar_mega.errors import ExitCode, UserError
from solar_mega.runtime.console import say, table


@dataclass(frozen=True)
class PlotOptions:
    """Runs beside each other, from their metrics.jsonl: losses, gradient norm, speed, memory."""

    runs: Positional[tuple[Path, ...]]
    """Runs' output directories, or metrics files."""

    out: Path = Path("runs.png")
    """The picture; its suffix says the format (png, svg, pdf)."""

    x: Literal["step", "tokens", "flops", "hours"] = "tokens"
    """What the horizontal axis counts."""

    smooth: int = 1
    """Steps averaged in the curves; validation losses are never smoothed."""


def plot(argv: Sequence[str]) -> int:
    """`solar-mega plot RUN... [--out runs.png]`"""
    options = parse_options(PlotOptions, argv, "plot")
    from solar_mega.train.plot import draw, load, summary

    if not options.runs:
        raise UserError("plot: name at least one run's output directory")
    runs = load(options.runs)
    draw(runs, options.out, options.x, options.smooth)
    say(table(summary(runs), ("run", "step", "loss", "best validation", "tok/s", "memory")))
    say(f"drawn: {options.out}")
    return ExitCode.DONE


def pretrain(argv: Sequence[str]) -> int:
    """`solar-mega pretrain --config x.toml [--section.key value] [--dry-run]`; returns the exit code."""
    options, cfg = parse_run(RunOptions, PretrainConfig, argv, "pretrain")
    from solar_mega.train.pretrain import prepare, pretrain
    from solar_mega.train.stage import describe

    if options.dry_run:
        # The layout of the configuration is checked, not the one process that checks it.
        world = cfg.parallel.tp * cfg.parallel.pp * (cfg.parallel.dp or 1)
        say(to_toml(cfg))
        say(describe(cfg, prepare(cfg, world), cfg.parallel.dp or 1))
        return 0
    return ExitCode.REQUEUE if pretrain(cfg).stopped_by else ExitCode.DONE
