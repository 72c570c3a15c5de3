"""Which tokens go through the model together: scoring requests with common beginnings share them.

The answers of a multiple-choice question share its context, and the questions of a subject share their
examples. Such sequences become one group: the common beginning once, then what is different of each.

    requests   c c c c a a       group   c c c c │ a a │ b b b         positions   0 1 2 3 │ 4 5 │ 4 5 6
               c c c c b b b             prefix    suffixes

A token sees the prefix up to itself and its own suffix (`attention.py`). Groups lie end to end in a batch,
one row without padding. Everything here is arithmetic on token ids: no model, no ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

LONGEST_SUFFIXES = 1024
"""Most tokens in the suffixes of a group: their attention is computed as one block, masked."""


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; both are token ids, and neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class GroupLayout:
    """Where a group lies in its batch: tokens start ... start + prefix + sum(suffixes) - 1."""

    start: int
    prefix: int
    suffixes: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.prefix + sum(self.suffixes)


@dataclass
class Batch:
    """One row of S tokens for the model, and what to read off it."""

    tokens: Tokens
    """[S]"""
    positions: Tokens
    """[S], counted from the beginning of each sequence."""
    groups: list[GroupLayout]
    rows: Tokens
    """[n] places in the row whose next token is scored, request after request."""
    targets: Tokens
    """[n] those next tokens."""
    requests: list[int]
    """Numbers of the requests answered, in the order of `rows`."""
    counts: list[int]
    """Tokens scored for each of them."""


@dataclass
class _Sequence:
    """An input of the model and the requests it answers."""

    tokens: Tokens
    answers: list[tuple[int, Tokens]] = field(default_factory=list)


@dataclass
class _Group:
    members: list[_Sequence]
    prefix: int

    @property
    def size(self) -> int:
        return self.prefix + sum(len(member.tokens) - self.prefix for member in self.members)


def make_batches(requests: Sequence[Request], max_length: int, batch_tokens: int) -> list[Batch]:
    """Batches of about `batch_tokens` tokens that answer all requests, the largest groups first.

    A sequence longer than the model's `max_length` loses its beginning, as in lm-evaluation-harness.
    Raises ValueError for an empty context or continuation, or a continuation longer than `max_length`.
    """
    groups = _share_prefixes(_unique_inputs(requests, max_length), batch_tokens)
    groups.sort(key=lambda group: -group.size)
    batches: list[Batch] = []
    waiting: list[_Group] = []
    for group in groups:
        if waiting and sum(other.size for other in waiting) + group.size > batch_tokens:
            batches.append(_lay_out(waiting))
            waiting = []
        waiting.append(group)
    if waiting:
        batches.append(_lay_out(waiting))
    return batches


def _unique_inputs(requests: Sequence[Request], max_length: int) -> list[_Sequence]:
    """Sorted by tokens, so that common beginnings are neighbours."""
    found: dict[bytes, _Sequence] = {}
    for number, request in enumerate(requests):
        context, continuation = list(request.context), list(request.continuation)
        if not context or not continuation or len(continuation) > max_length:
            raise ValueError(
                f"request {number} has {len(context)} tokens of context and {len(continuation)} to score; "
                f"needed: 1 or more of each, and at most {max_length} to score"
            )
        tokens = np.asarray((context + continuation)[-(max_length + 1) :][:-1], dtype=np.int64)
        # Big-endian bytes sort as the ids do.
        entry = found.setdefault(tokens.astype(">i8").tobytes(), _Sequence(tokens))
        entry.answers.append((number, np.asarray(continuation, dtype=np.int64)))
    return [found[key] for key in sorted(found)]


def _share_prefixes(sequences: Sequence[_Sequence], batch_tokens: int) -> list[_Group]:
    """Joins a sequence to the group before it when that leaves fewer tokens to compute."""
    groups: list[_Group] = []
    for sequence in sequences:
        if groups and _joined(groups[-1], sequence, batch_tokens):
            continue
        groups.append(_Group([sequence], len(sequence.tokens)))
    return groups


def _joined(group: _Group, sequence: _Sequence, batch_tokens: int) -> bool:
    prefix = min(group.prefix, _common_length(group.members[-1].tokens, sequence.tokens))
    # A shorter prefix costs every member the difference; the newcomer saves the whole of it.
    if len(group.members) * (group.prefix - prefix) >= prefix:
        return False
    grown = _Group([*group.members, sequence], prefix)
    if grown.size > batch_tokens or grown.size - prefix > LONGEST_SUFFIXES:
        return False
    group.members, group.prefix = grown.members, prefix
    return True


def _common_length(a: Tokens, b: Tokens) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def _lay_out(groups: Sequence[_Group]) -> Batch:
    tokens, positions, layouts, rows, targets = [], [], [], [], []
    requests: list[int] = []
    counts: list[int] = []
    start = 0
    for group in groups:
        prefix = group.prefix
        tokens.append(group.members[0].tokens[:prefix])
        positions.append(np.arange(prefix))
        place, suffixes = start + prefix, []
        for member in group.members:
            suffix = member.tokens[prefix:]
            for number, answer in member.answers:
                at = np.arange(len(member.tokens) - len(answer), len(member.tokens))
                rows.append(np.where(at < prefix, start + at, place + at - prefix))
                targets.append(answer)
                requests.append(number)
                counts.append(len(answer))
            if len(suffix):
                tokens.append(suffix)
                positions.append(np.arange(prefix, len(member.tokens)))
                suffixes.append(len(suffix))
                place += len(suffix)
        layouts.append(GroupLayout(start, prefix, tuple(suffixes)))
        start = place
    whole = [np.concatenate(part).astype(np.int64) for part in (tokens, positions, rows, targets)]
    return Batch(whole[0], whole[1], layouts, whole[2], whole[3], requests, counts)


def prompt_batch(prompts: Sequence[Sequence[int]]) -> Batch:
    """One row of whole prompts, each on its own; `rows` are their last tokens, nothing is scored."""
    lengths = [len(prompt) for prompt in prompts]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return Batch(
        tokens=np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts]),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        groups=[GroupLayout(int(start), length) for start, length in zip(starts, lengths, strict=True)],
        rows=starts + np.asarray(lengths) - 1,
        targets=np.zeros(len(lengths), dtype=np.int64),
        requests=list(range(len(lengths))),
        counts=[1] * len(lengths),
    )
