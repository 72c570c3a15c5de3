"""Pairs -> packed rows -> micro-batches, the same pairs in a step whatever the layout.

    one row:   [ chosen 0 | rejected 0 | chosen 1 | rejected 1 | ... | padding ]      train.seq_length tokens
                0        cu[1]        cu[2]      cu[3]               cu[2P]    cu[-1]

Step k takes pairs [k G, (k+1) G) of the shuffled order, G = train.global_batch_size, and packs them into as
few rows as hold them; the rows are dealt to the data-parallel ranks in turn. How many a rank gets differs
from step to step, and ranks that get fewer are filled up with rows without pairs. Sums over pairs do not
notice.
"""

import functools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solar_mega.data.packing import pack, packed_batch, places
from solar_mega.data.preference_tokens import TokenPair

Row = list[int]
"""Numbers of the pairs in it."""


def places_of(pair: TokenPair) -> int:
    """What a pair takes of a row: the last token of each response is only ever a label."""
    return places(len(pair.chosen)) + places(len(pair.rejected))


def collate(
    pairs: Sequence[TokenPair],
    length: int,
    reference: np.ndarray | None = None,
    rpo_weight: float = 0.0,
) -> dict[str, Any]:
    """One packed row of `length` tokens.

    reference: [pairs, 2] fp64, the reference model's summed log-probs of chosen and rejected.
    rpo_weight: of the chosen responses' negative log-likelihood in this row.

    Returns the batch that `packed_batch` makes, with cu_seqlens [2 P + 1, or 2 P + 2 with padding], and
    reference [2 P] fp64, and the numbers pairs and rpo_weight.
    """
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    known = np.zeros(2 * len(pairs)) if reference is None else np.array(reference, np.float64).reshape(-1)
    batch = packed_batch(responses, length, pad_id=0)
    return {**batch, "reference": torch.from_numpy(known), "pairs": len(pairs), "rpo_weight": rpo_weight}


@dataclass(frozen=True)
class RowPlan:
    """How pairs are put into rows, and rows dealt to ranks."""

    length: int
    """Tokens of a row."""
    packing: bool
    dp: int
    dp_rank: int
    multiple: int = 1
    """Rows per rank are a multiple of this: the interleaved pipeline schedule works in groups."""

    def rows(self, numbers: Sequence[int], pairs: Sequence[TokenPair]) -> list[Row]:
        """All rows of these pairs, of every rank, fillers left out."""
        if not self.packing:
            return [[number] for number in numbers]
        lengths = [places_of(pairs[number]) for number in numbers]
        return [[numbers[i] for i in row] for row in pack(lengths, self.length)]

    def per_rank(self, rows: Sequence[Row]) -> int:
        each = -(-len(rows) // self.dp)
        return -(-each // self.multiple) * self.multiple

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        """This rank's rows, filled up with empty ones."""
        mine = list(rows[self.dp_rank :: self.dp])
        return mine + [[]] * (self.per_rank(rows) - len(mine))


@dataclass(frozen=True)
class Loader:
    """Micro-batches of a set of pairs with their reference log-probs."""

    pairs: Sequence[TokenPair]
    reference: np.ndarray | None
    """[pairs, 2] fp64."""
    plan: RowPlan
    rpo_alpha: float = 0.0
    rpo_mean: str = "tokens"

    def count(self, numbers: Sequence[int]) -> int:
        """Micro-batches of each rank for these pairs."""
        return self.plan.per_rank(self.plan.rows(numbers, self.pairs))

    def batches(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of one global batch."""
        tokens = sum(self._chosen_tokens(number) for number in numbers)
        for row in self.plan.mine(self.plan.rows(numbers, self.pairs)):
            known = None if self.reference is None else self.reference[row]
            weight = self._rpo_weight(row, len(numbers), tokens)
            yield collate([self.pairs[number] for number in row], self.plan.length, known, weight)

    def _rpo_weight(self, row: Row, pairs: int, tokens: int) -> float:
        """alpha, such that the mean over tokens of a row comes out as its part of the global batch's mean."""
        if not self.rpo_alpha or not row or self.rpo_mean == "sequences":
            return self.rpo_alpha
        mine = sum(self._chosen_tokens(number) for number in row)
        return self.rpo_alpha * mine * pairs / (len(row) * tokens)

    def _chosen_tokens(self, number: int) -> int:
        return int(self.pairs[number].chosen.loss.sum())


@dataclass(frozen=True)
class Order:
    """The shuffled passes over the pairs; sample i of the run is the same on every layout and at resume."""

    pairs: int
    batch: int
    seed: int

    def of_step(self, step: int) -> list[int]:
        """Numbers of the pairs of step `step`, counted from 1."""
        first, numbers = (step - 1) * self.batch, []
        while len(numbers) < self.batch:
            epoch, start = divmod(first + len(numbers), self.pairs)
            numbers += _shuffled(self.pairs, self.seed, epoch)[start : start + self.batch - len(numbers)]
        return numbers


@functools.lru_cache(maxsize=2)
def _shuffled(pairs: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(pairs))
    random.Random(f"{seed} epoch {epoch}").shuffle(order)
    return tuple(order)


class TrainingRows:
    """Iterator over this rank's micro-batches from a step on, with the time it kept the loop waiting."""

    def __init__(self, loader: Loader, order: Order, first_step: int) -> None:
        self.wait_seconds = 0.0
        self._loader, self._order = loader, order
        self._rows = self._all(first_step + 1)

    def micro_batches(self, step: int) -> int:
        return self._loader.count(self._order.of_step(step))

    def __iter__(self) -> "TrainingRows":
        return self

    def __next__(self) -> dict[str, Tensor]:
        began = time.perf_counter()
        row = next(self._rows)
        self.wait_seconds += time.perf_counter() - began
        return row

    def _all(self, step: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._loader.batches(self._order.of_step(step))
            step += 1
