"""`solar-mega dpo`."""

from collections.abc import Sequence

from solar_mega.config.command_line import RunOptions, parse_run
from solar_mega.config.dpo import DPOConfig
from solar_mega.config.load import to_toml
from solar_mega.errors import ExitCode
from solar_mega.runtime.console import say


def dpo(argv: Sequence[str]) -> int:
    """`solar-mega dpo --config x.toml [--section.key value] [--dry-run]`; returns the exit code."""
    options, cfg = parse_run(RunOptions, DPOConfig, argv, "dpo")
    from solar_mega.align import dpo as step
    from solar_mega.align import ladder

    if options.dry_run:
        say(to_toml(cfg))
        say(ladder.describe(cfg) if cfg.ladder.chunks else step.describe_run(cfg))
        return 0
    outcome = ladder.climb(cfg) if cfg.ladder.chunks else step.dpo(cfg)
    return ExitCode.REQUEUE if outcome.stopped_by else ExitCode.DONE
