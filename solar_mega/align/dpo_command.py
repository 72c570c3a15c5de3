"""`solar-mega dpo`."""

from collections.abc import Sequence

from solar_mega.align.samples import PreviewOptions, open_template, show
from solar_mega.config.command_line import parse_run
from solar_mega.config.dpo import DPOConfig
from solar_mega.config.load import to_toml
from solar_mega.errors import ExitCode
from solar_mega.runtime.console import say


def dpo(argv: Sequence[str]) -> int:
    """`solar-mega dpo --config x.toml [--section.key value] [--dry-run | --preview N]`; returns the exit
    code."""
    options, cfg = parse_run(PreviewOptions, DPOConfig, argv, "dpo")
    from solar_mega.align import dpo as step
    from solar_mega.align import ladder

    if options.preview > 0:
        _preview(cfg, options.preview)
        return 0
    if options.dry_run:
        say(to_toml(cfg))
        say(ladder.describe(cfg) if cfg.ladder.chunks else step.describe_run(cfg))
        return 0
    outcome = ladder.climb(cfg) if cfg.ladder.chunks else step.dpo(cfg)
    return ExitCode.REQUEUE if outcome.stopped_by else ExitCode.DONE


def _preview(cfg: DPOConfig, count: int) -> None:
    from solar_mega.align.pairs import pair_options, specs_of
    from solar_mega.data.preference_tokens import Lengths
    from solar_mega.data.preferences import read_pairs
    from solar_mega.data.preview import preview_pair

    train, valid, chunks = specs_of(cfg)
    tokenizer, template = open_template(cfg.data, cfg.model)
    options = pair_options(cfg.data, cfg.train.seed)
    lengths = Lengths(cfg.data.max_length, cfg.data.max_prompt_length)
    show(
        [*train, *(spec for chunk in chunks for spec in chunk), *valid],
        count,
        read=lambda spec: read_pairs(spec, options),
        draw=lambda pair: preview_pair(pair, template, tokenizer, lengths),
        name=lambda pair: pair.id,
    )
