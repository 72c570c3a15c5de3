"""Micro-batches by consumed samples: the position in the data is one number, whatever the layout.

Step k consumes samples [k G, (k+1) G) with G the global batch. Micro-batch j of data-parallel rank r holds

    k G + (j * DP + r) * b + [0, b)          b = micro-batch size

so that j runs through the step in order and every (DP, b) covers the same samples once. A run resumed with
other TP, PP or DP goes on from the same number.
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from solar_mega.errors import UserError

if TYPE_CHECKING:
    import torch

_PREFETCHED = 4
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleSource(Protocol):
    """Sample i as a dict of tensors [seq_length]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> "dict[str, torch.Tensor]": ...


@dataclass(frozen=True)
class _Plan:
    """Which samples this rank reads, in order."""

    first: int
    end: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    global_batch_size: int

    def sample_ids(self) -> Iterator[list[int]]:
        b, stride = self.micro_batch_size, self.micro_batch_size * self.dp_size
        for step in range(self.first, self.end - self.global_batch_size + 1, self.global_batch_size):
            for start in range(step + self.dp_rank * b, step + self.global_batch_size, stride):
                yield list(range(start, start + b))


class Batches:
    """Iterator over this rank's micro-batches: dicts of tokens, labels, position_ids (int64 [b, s]),
    loss_mask (float32 [b, s]) and sample_ids (list of b ints). Ends before a global batch that the dataset
    cannot fill.

    A background thread reads a few micro-batches ahead; it starts with the first `next` and ends with the
    data or with this object. Ranks that never ask (pipeline stages in the middle) read nothing.

    Args:
        dataset: sample i of the run at index i.
        consumed_samples: samples of earlier steps, over all ranks.
        dp_rank, dp_size: place among, and number of, data-parallel replicas.
        global_batch_size: samples per step over all replicas.
        vocab_size: when given, an id beyond it is an error that names the sample; a vocabulary-parallel
            embedding would silently look up zeros.

    Raises:
        UserError: micro-batches and replicas do not divide the global batch.
    """

    def __init__(
        self,
        dataset: SampleSource,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        *,
        vocab_size: int | None = None,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"train.global_batch_size = {global_batch_size} is not a multiple of "
                f"train.micro_batch_size x data-parallel "
                f"size = {micro_batch_size} x {dp_size}"
            )
        self.wait_seconds = 0.0
        """Time spent in `next` waiting for data, since the beginning."""
        self.micro_batches_per_step = global_batch_size // (micro_batch_size * dp_size)
        self._dataset = dataset
        self._plan = _Plan(
            consumed_samples, len(dataset), micro_batch_size, dp_rank, dp_size, global_batch_size
        )
        self._vocab_size = vocab_size
        self._ready: queue.Queue[Any] = queue.Queue(_PREFETCHED)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._stop.set)  # the thread does not hold this object, so it can go

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            arguments = (self._dataset, self._plan, self._vocab_size, self._ready, self._stop)
            self._thread = threading.Thread(target=_read_ahead, args=arguments, name="batches", daemon=True)
            self._thread.start()
        begin = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, dict):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the background thread; further `next` stop the iteration."""
        self._stop.set()


def _read_ahead(
    dataset: SampleSource,
    plan: _Plan,
    vocab_size: int | None,
    ready: "queue.Queue[Any]",
    stop: threading.Event,
) -> None:
    """Puts batches, then None or the exception that ended them."""
    try:
        for ids in plan.sample_ids():
            if not _put(ready, _collate(dataset, ids, vocab_size), stop):
                return
        _put(ready, None, stop)
    except BaseException as error:
        _put(ready, error, stop)


def _put(ready: "queue.Queue[Any]", item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _collate(dataset: SampleSource, ids: list[int], vocab_size: int | None) -> dict[str, Any]:
    import torch

    samples = [dataset[id] for id in ids]
    batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in _FIELDS}
    if vocab_size is not None:
        for id, tokens, labels in zip(ids, batch["tokens"], batch["labels"], strict=True):
            largest = int(torch.maximum(tokens.max(), labels.max()))
            if largest >= vocab_size:
                raise UserError(
                    f"sample {id} of the data holds token {largest}, but the model's vocabulary has "
                    f"{vocab_size}; "
                    "its corpus was made with another tokenizer"
                )
    batch["sample_ids"] = ids
    return batch
