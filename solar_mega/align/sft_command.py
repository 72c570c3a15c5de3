"""`solar-mega sft`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from solar_mega.align.samples import PreviewOptions, open_template, show
from solar_mega.config.command_line import parse_run
from solar_mega.config.load import to_toml
from solar_mega.config.sft import SFTConfig
from solar_mega.errors import ExitCode
from solar_mega.runtime.console import say


def sft(argv: Sequence[str]) -> int:
    """`solar-mega sft --config x.toml [--section.key value] [--dry-run | --preview N]`; returns the exit
    code."""
    options, cfg = parse_run(PreviewOptions, SFTConfig, argv, "sft")
    from solar_mega.align import sft as stage

    if options.preview > 0:
        _preview(cfg, options.preview)
        return 0
    if options.dry_run:
        # The layout of the configuration is checked, not the one process that checks it.
        world = cfg.parallel.tp * cfg.parallel.pp * (cfg.parallel.dp or 1)
        with tempfile.TemporaryDirectory() as cache:
            resolved, data, prepared = stage.prepare(cfg, world, Path(cache))
            say(to_toml(resolved))
            say(stage.describe(resolved, data, prepared))
        return 0
    return ExitCode.REQUEUE if stage.sft(cfg).stopped_by else ExitCode.DONE


def _preview(cfg: SFTConfig, count: int) -> None:
    from solar_mega.align.sft import token_options
    from solar_mega.data.instructions import read_instructions, specs_of
    from solar_mega.data.preview import preview

    train, valid = specs_of(cfg.data.train, cfg.data.valid)
    tokenizer, template = open_template(cfg.data, cfg.model)
    options = token_options(cfg)
    show(
        train + valid,
        count,
        read=lambda spec: read_instructions(spec, cfg.train.seed),
        draw=lambda instruction: preview(instruction, template, tokenizer, options),
        name=lambda instruction: instruction.where,
    )
