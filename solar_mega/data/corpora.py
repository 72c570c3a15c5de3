"""What a run reads: corpora with weights, cut into training and validation parts, and checked before any
work."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solar_mega.config.schema import DataConfig
from solar_mega.data.indexed import Corpus, open_corpus
from solar_mega.errors import Problems, UserError

# Corpora without our description are sampled for ids that the model does not have: this many tokens in
# this many places.
_SAMPLED_TOKENS, _SAMPLED_PLACES = 1 << 20, 16


@dataclass(frozen=True)
class Part:
    """The sequences first .. last - 1 of a corpus, drawn with a weight relative to the other parts of its
    blend."""

    corpus: Corpus
    weight: float
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.corpus.tokens_between(self.first, self.last)

    def samples_per_epoch(self, seq_length: int) -> int:
        """Samples of seq_length tokens; the token after the last one of a sample is its last label."""
        return max(0, self.tokens - 1) // seq_length


@dataclass(frozen=True)
class Blends:
    """The parts that training and validation draw from; `valid` is empty when there is no validation."""

    train: tuple[Part, ...]
    valid: tuple[Part, ...]


def parse_blend(entries: Sequence[str], key: str, problems: Problems) -> list[tuple[float | None, str]]:
    """`["0.7 a/text", "0.3 b/code"]` or `["a/text", "b/code"]` as (weight or None, prefix). Adds to
    `problems` weights that are not positive numbers and lists in which only some entries have one."""
    parsed: list[tuple[float | None, str]] = []
    for entry in entries:
        head, _, rest = entry.strip().partition(" ")
        weight = _number(head) if rest else None
        if weight is not None and not (0 < weight < float("inf")):
            problems.add(f'{key}: "{entry}" has weight {head}; weights are positive numbers')
            weight = 1.0
        parsed.append((weight, entry.strip() if weight is None else rest.strip()))
    weighted = sum(weight is not None for weight, _ in parsed)
    if 0 < weighted < len(parsed):
        bare = [prefix for weight, prefix in parsed if weight is None]
        problems.add(f"{key}: give every corpus a weight or none; without one: {', '.join(bare)}")
    return parsed


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_corpora(
    data: DataConfig,
    seq_length: int,
    *,
    validation: bool = True,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    fingerprint: str | None = None,
) -> Blends:
    """Opens every corpus of the configuration and cuts it into its parts; reads headers, not texts.

    Args:
        validation: whether the run validates at all.
        vocab_size, eos_id, fingerprint: of the model and tokenizer to train with; what is None is not
        checked.

    Raises:
        UserError: all that is wrong: missing or truncated files, another tokenizer, ids beyond the
            vocabulary, parts shorter than one sample, unusable weights or splits.
    """
    problems = Problems()
    opened: dict[str, Corpus | None] = {}

    def open_all(entries: Sequence[str], key: str) -> list[tuple[float | None, Corpus]]:
        found = []
        for weight, prefix in parse_blend(entries, key, problems):
            if prefix not in opened:
                opened[prefix] = _open_checked(prefix, key, vocab_size, eos_id, fingerprint, problems)
            corpus = opened[prefix]
            if corpus is not None:
                found.append((weight, corpus))
        return found

    if not data.train:
        problems.add('data.train names no corpus; give prefixes of .bin/.idx files, such as ["data/text"]')
    train = open_all(data.train, "data.train")
    valid = open_all(data.valid, "data.valid") if validation else []
    share = _train_share(data, problems) if validation and not data.valid else 1.0
    train_parts = [_part(weight, corpus, 0.0, share) for weight, corpus in train]
    valid_parts = [_part(weight, corpus, 0.0, 1.0) for weight, corpus in valid]
    if validation and not data.valid:
        valid_parts = [_part(weight, corpus, share, 1.0) for weight, corpus in train]
    _check_lengths(train_parts, "data.train", "training", seq_length, problems)
    _check_lengths(
        valid_parts, "data.valid" if data.valid else "data.split", "validation", seq_length, problems
    )
    problems.raise_if_any("data")
    return Blends(tuple(train_parts), tuple(valid_parts))


def _train_share(data: DataConfig, problems: Problems) -> float:
    train, valid = data.split
    if not (train > 0 and valid > 0):
        problems.add(
            f"data.split = {list(data.split)} leaves {'training' if train <= 0 else 'validation'} "
            f"nothing; give two "
            "positive shares, or validation corpora in data.valid, or train.eval_samples = 0"
        )
        return 1.0
    return train / (train + valid)


def _part(weight: float | None, corpus: Corpus, begin: float, end: float) -> Part:
    # Documents are cut where Megatron's own split cuts them. Without weights, tokens are drawn in proportion.
    first, last = round(begin * corpus.sequences), round(end * corpus.sequences)
    return Part(corpus, float(corpus.tokens) if weight is None else weight, first, last)


def _check_lengths(parts: Sequence[Part], key: str, use: str, seq_length: int, problems: Problems) -> None:
    for part in parts:
        if part.samples_per_epoch(seq_length) < 1:
            problems.add(
                f"{key}: {part.corpus.prefix} has {part.tokens} tokens in {part.last - part.first} "
                f"documents for {use}, "
                f"fewer than one sample needs (train.seq_length + 1 = {seq_length + 1})"
            )


def _open_checked(
    prefix: str,
    key: str,
    vocab_size: int | None,
    eos_id: int | None,
    fingerprint: str | None,
    problems: Problems,
) -> Corpus | None:
    try:
        corpus = open_corpus(prefix)
    except UserError as error:
        problems.add(f"{key}: {error}")
        return None
    description = corpus.description
    if description and description.get("tokens") != corpus.tokens:
        problems.add(
            f"{key}: {prefix}.json describes {description.get('tokens')} tokens, but the corpus has "
            f"{corpus.tokens}; "
            "it belongs to another one: remove it"
        )
        return corpus
    maker = description.get("tokenizer", {})
    if fingerprint and maker and maker["fingerprint"] != fingerprint:
        problems.add(
            f'{key}: {prefix} was made with another tokenizer ("{maker["name"]}", {maker["vocab_size"]} '
            f"tokens, EOS "
            f"{maker['eos_id']}; fingerprint {maker['fingerprint'][:8]}, the run's is {fingerprint[:8]}); "
            "tokenize it again, or name its tokenizer in data.tokenizer"
        )
    elif eos_id is not None and maker and maker["eos_id"] != eos_id:
        problems.add(
            f"{key}: {prefix} ends its documents with token {maker['eos_id']}, the run's tokenizer with "
            f"{eos_id}"
        )
    if vocab_size is not None:
        largest = description.get("largest_id", _largest_sampled(corpus) if not description else -1)
        if largest >= vocab_size:
            problems.add(
                f"{key}: {prefix} holds token {largest}, but the model's vocabulary has {vocab_size} "
                "(ids 0 to vocab_size - 1); it was made with a larger tokenizer"
            )
    return corpus


def _largest_sampled(corpus: Corpus) -> int:
    count = _SAMPLED_TOKENS // _SAMPLED_PLACES
    if corpus.tokens <= _SAMPLED_TOKENS:
        return int(corpus.read_tokens(0, corpus.tokens).max())
    places = np.linspace(0, corpus.tokens - count, _SAMPLED_PLACES).astype(np.int64)
    return max(int(corpus.read_tokens(int(place), count).max()) for place in places)
