"""Samples of different lengths packed into rows of one length, and rows handed out by their number.

    row of s = 12 places     [ 0  1  2  3  0  1  2  3  4  0  1  2 ]     position_ids
                             [ A  A  A  A  B  B  B  B  B  -  -  - ]     cu_seqlens = 0 4 9 12, padding last

A sample of n tokens takes n - 1 places: its last token is only ever a label. Nothing here imports torch
before a batch is made.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Sample(Protocol):
    """Tokens and which of them are to be predicted, as `chat.Encoded` has them."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def loss(self) -> np.ndarray: ...


def places(sample_length: int) -> int:
    """What a sample of so many tokens takes of a row."""
    return sample_length - 1


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit: each item, in order, into the first bin with room for it, a new one where there is none.

    Deterministic, O(n log n). At most 1.7 times as many bins as needed; far fewer for many short items.

    Returns:
        Bins in the order of their opening, each the indices of its items in order.

    Raises:
        ValueError: an item is larger than `capacity`, or not positive.
    """
    bins: list[list[int]] = []
    tree = _Rooms(len(lengths), capacity)
    for i, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"item {i} has length {length}; allowed: 1 to {capacity}")
        at = tree.first_with(length)
        if at == len(bins):
            bins.append([])
        bins[at].append(i)
        tree.take(at, length)
    return bins


class _Rooms:
    """Room left in each of up to `count` bins, all empty: a tree of maxima, so that the first bin with enough
    of it is found in log(count) steps."""

    def __init__(self, count: int, capacity: int) -> None:
        self.leaves = 1 << max(0, count - 1).bit_length()
        self.most = [capacity] * (2 * self.leaves)

    def first_with(self, room: int) -> int:
        at = 1
        while at < self.leaves:
            at = 2 * at if self.most[2 * at] >= room else 2 * at + 1
        return at - self.leaves

    def take(self, index: int, room: int) -> None:
        at = index + self.leaves
        self.most[at] -= room
        while at > 1:
            at //= 2
            self.most[at] = max(self.most[2 * at], self.most[2 * at + 1])


def packed_batch(samples: Sequence[Sample], seq_length: int, pad_id: int) -> dict[str, "torch.Tensor"]:
    """One row of `samples`, one after the other, as a batch of the model.

    Returns:
        tokens, labels, position_ids [1, seq_length] int64, loss_mask [1, seq_length] fp32: 1 where the label
        is to be predicted; cu_seqlens [samples + 1, or + 2 with padding] int32. Padding is told by the mask
        and by its place, never by `pad_id`, which may be any token.

    Raises:
        ValueError: the samples do not fit into the row.
    """
    import torch

    sizes = [places(len(sample.ids)) for sample in samples]
    used = sum(sizes)
    if used > seq_length:
        raise ValueError(f"samples of {used} places in a row of {seq_length}")
    if used < seq_length:
        sizes.append(seq_length - used)
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, pad_id, dtype=np.int64)
    mask = np.zeros(seq_length, dtype=np.float32)
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    for sample, begin in zip(samples, bounds, strict=False):
        end = begin + places(len(sample.ids))
        tokens[begin:end], labels[begin:end] = sample.ids[:-1], sample.ids[1:]
        mask[begin:end] = sample.loss[1:]
    positions = np.arange(seq_length) - np.repeat(bounds[:-1], sizes)
    row = {"tokens": tokens, "labels": labels, "position_ids": positions.astype(np.int64), "loss_mask": mask}
    batch = {name: torch.from_numpy(values)[None] for name, values in row.items()}
    return batch | {"cu_seqlens": torch.from_numpy(bounds)}


class PackedRows:
    """The rows of a training, by number: the data set again and again, each pass in an order of its own,
    packed afresh. Row r is the same whatever came before it was asked for, so that a run resumes by the
    number of rows it has consumed.

    Args:
        lengths: tokens of every sample.
        seq_length: places of a row.
        seed: of the orders; None keeps the samples as they are.
        together: several samples in a row; False gives each a row of its own.
    """

    def __init__(
        self, lengths: Sequence[int], seq_length: int, seed: int | None, *, together: bool = True
    ) -> None:
        if not len(lengths):
            raise ValueError("no samples to pack")
        self._lengths, self._seq_length, self._seed, self._together = lengths, seq_length, seed, together
        self._ends: list[int] = []  # rows up to the end of each pass seen so far
        self._pass: tuple[int, list[list[int]]] = (-1, [])

    def rows_in(self, epochs: float) -> int:
        """Rows of so many passes, a part of a pass being that part of its rows, rounded up."""
        whole = int(epochs)
        begin = self._begin(whole)
        if epochs == whole:
            return begin
        return begin + int(np.ceil((epochs - whole) * len(self._packed(whole))))

    def __getitem__(self, row: int) -> list[int]:
        """The samples of row `row`, counted from 0 over all passes."""
        epoch = 0
        while self._end(epoch) <= row:
            epoch += 1
        return self._packed(epoch)[row - self._begin(epoch)]

    def _begin(self, epoch: int) -> int:
        return self._end(epoch - 1) if epoch else 0

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._packed(len(self._ends))))
        return self._ends[epoch]

    def _packed(self, epoch: int) -> list[list[int]]:
        if self._pass[0] != epoch:
            order = list(range(len(self._lengths)))
            if self._seed is not None:
                random.Random(f"{self._seed} {epoch}").shuffle(order)
            if self._together:
                sizes = [places(self._lengths[i]) for i in order]
                rows = [[order[i] for i in row] for row in pack(sizes, self._seq_length)]
            else:
                rows = [[i] for i in order]
            self._pass = (epoch, rows)
        return self._pass[1]


class RowFeed:
    """Batches of one row each for one data-parallel rank: every dp_size-th row.

    Attributes:
        wait_seconds: time spent in making batches.
    """

    def __init__(
        self,
        rows: PackedRows | Sequence[list[int]],
        samples: Sequence[Sample] | Mapping[int, Sample],
        *,
        first_row: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_id: int,
    ) -> None:
        self._rows, self._samples = rows, samples
        self._first_row = first_row
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seq_length, self._pad_id = seq_length, pad_id
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        row = self._first_row + self._dp_rank
        while True:
            begin = time.perf_counter()
            batch: dict[str, Any] = packed_batch(
                [self._samples[i] for i in self._row(row)], self._seq_length, self._pad_id
            )
            batch["row"] = row
            self.wait_seconds += time.perf_counter() - begin
            yield batch
            row += self._dp_size

    def _row(self, row: int) -> list[int]:
        """A list of rows ends; what is asked for beyond is padding throughout, which counts nothing."""
        if isinstance(self._rows, PackedRows) or row < len(self._rows):
            return self._rows[row]
        return []
