"""Command lines of the trainings."""

from collections.abc import Sequence

from solar_mega.config.command_line import RunOptions, parse_run
from solar_mega.config.load import to_toml
from solar_mega.config.schema import PretrainConfig
from solar_mega.runtime.console import say


def pretrain(argv: Sequence[str]) -> int:
    """`solar-mega pretrain --config x.toml [--section.key value] [--dry-run]`; returns the exit code."""
    options, cfg = parse_run(RunOptions, PretrainConfig, argv, "pretrain")
    from solar_mega.runtime.signals import REQUEUE_EXIT_CODE
    from solar_mega.train.pretrain import prepare, pretrain
    from solar_mega.train.stage import describe

    if options.dry_run:
        # The layout of the configuration is checked, not the one process that checks it.
        world = cfg.parallel.tp * cfg.parallel.pp * (cfg.parallel.dp or 1)
        say(to_toml(cfg))
        say(describe(cfg, prepare(cfg, world), cfg.parallel.dp or 1))
        return 0
    return REQUEUE_EXIT_CODE if pretrain(cfg).stopped_by else 0
