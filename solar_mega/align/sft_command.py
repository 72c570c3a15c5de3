"""`solar-mega sft`."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from solar_mega.config.command_line import RunOptions, parse_run
from solar_mega.config.load import to_toml
from solar_mega.config.sft import SFTConfig
from solar_mega.errors import ExitCode
from solar_mega.runtime.console import say


@dataclass(frozen=True)
class SFTOptions(RunOptions):
    preview: int = 0
    """Print this many conversations of each data set as they are trained on, what is in the loss between ⟦
    and ⟧, and stop."""


def sft(argv: Sequence[str]) -> int:
    """`solar-mega sft --config x.toml [--section.key value] [--dry-run | --preview N]`; returns the exit
    code."""
    options, cfg = parse_run(SFTOptions, SFTConfig, argv, "sft")
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
    from solar_mega.checkpoint.source import open_source
    from solar_mega.data.chat import BadConversation, load_template
    from solar_mega.data.instructions import read_instructions, specs_of
    from solar_mega.data.preview import preview
    from solar_mega.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.data.tokenizer or open_source(cfg.model.path).side_files)
    template = load_template(cfg.data.template, tokenizer)
    train, valid = specs_of(cfg.data.train, cfg.data.valid)
    for spec in train + valid:
        instructions, report = read_instructions(spec, cfg.train.seed)
        say(report.describe())
        for instruction in instructions[:count]:
            try:
                say("\n" + preview(instruction, template, tokenizer))
            except BadConversation as fault:
                say(f"\n{instruction.where}: left out: {fault}\n")
