"""The pairs of a run, read and tokenised once: by one rank for all."""

from collections.abc import Sequence
from dataclasses import dataclass

from solar_mega.config.dpo import DPOConfig, PairDataConfig
from solar_mega.data.chat import ChatTemplate
from solar_mega.data.preference_tokens import Lengths, TokenPair, fingerprint, tokenize_pairs
from solar_mega.data.preferences import FORMATS, PairOptions, read_pairs, read_prompts
from solar_mega.data.rows import DatasetSpec, parse_specs
from solar_mega.data.tokenizer import Tokenizer
from solar_mega.errors import Problems, UserError


@dataclass(frozen=True)
class PairSet:
    """Tokenised pairs in the order of their data sets and rows."""

    pairs: list[TokenPair]
    fingerprint: str
    """Hash of all tokens and what counts among them."""
    report: str
    """What became of the rows, for the console."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def tokens_per_pair(self) -> float:
        return sum(map(len, self.pairs)) / max(len(self.pairs), 1)


@dataclass(frozen=True)
class PairData:
    train: PairSet
    valid: PairSet | None


def specs_of(cfg: DPOConfig) -> tuple[list[DatasetSpec], list[DatasetSpec], list[list[DatasetSpec]]]:
    """Training, held-out and, for a ladder, each chunk's data sets. Raises UserError listing all that cannot
    be read as one."""
    problems = Problems()

    def parsed(texts: Sequence[str], key: str) -> list[DatasetSpec]:
        return parse_specs(texts, key, tuple(FORMATS), problems)

    train, valid = parsed(cfg.data.train, "data.train"), parsed(cfg.data.valid, "data.valid")
    chunks = [parsed(datasets_of(chunk), "ladder.chunks") for chunk in cfg.ladder.chunks]
    problems.raise_if_any("data sets")
    return train, valid, chunks


def datasets_of(chunk: str) -> tuple[str, ...]:
    """`A x.jsonl + B y.jsonl` -> its data sets."""
    return tuple(part.strip() for part in chunk.split(" + "))


def read_data(cfg: DPOConfig, template: ChatTemplate, tokenizer: Tokenizer) -> PairData:
    """Raises UserError when a data set cannot be read or leaves no pair, and as `data.strict` says."""
    train, valid, _ = specs_of(cfg)
    options = pair_options(cfg.data, cfg.train.seed)
    held_out = read_set(valid, cfg.data, options, template, tokenizer) if valid else None
    if held_out is not None and cfg.train.eval_samples:
        kept = held_out.pairs[: cfg.train.eval_samples]
        held_out = PairSet(kept, fingerprint(kept), held_out.report)
    return PairData(read_set(train, cfg.data, options, template, tokenizer), held_out)


def pair_options(data: PairDataConfig, seed: int) -> PairOptions:
    return PairOptions(
        insert_system=data.insert_system,
        exclude_sources=data.exclude_sources,
        exclude_prompts=read_prompts(data.exclude_prompts),
        drop_ties=data.drop_ties,
        strict=data.strict,
        seed=seed,
    )


def read_set(
    specs: Sequence[DatasetSpec],
    data: PairDataConfig,
    options: PairOptions,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> PairSet:
    """All pairs of some data sets."""
    lengths = Lengths(data.max_length, data.max_prompt_length)
    pairs, lines = [], []
    for spec in specs:
        found, report = read_pairs(spec, options)
        tokens, counts = tokenize_pairs(found, template, tokenizer, lengths, report)
        pairs += tokens
        lines += [report.describe(), counts.describe()]
        if data.strict and report.faults:
            raise UserError(f"data.strict = true\n{report.describe()}")
        if not tokens:
            raise UserError(f"no pair of {spec.path} is left after tokenising\n{report.describe()}")
    return PairSet(pairs, fingerprint(pairs), "\n".join(lines))
