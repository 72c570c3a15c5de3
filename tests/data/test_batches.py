import gc
import itertools
import threading

import pytest
import torch

from solar_mega.data.batches import Batches
from solar_mega.errors import UserError

GLOBAL, SEQ = 24, 4


class Numbered:
    """Sample i is made of the number i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = torch.full((SEQ,), index)
        return {
            "tokens": number,
            "labels": number + 1,
            "loss_mask": torch.ones(SEQ),
            "position_ids": torch.arange(SEQ),
        }


def steps(dataset, consumed, micro, dp, count):
    """Sample ids of `count` steps: [step][micro-batch][rank] -> ids, and the union per step."""
    ranks = [Batches(dataset, consumed, micro, rank, dp, GLOBAL) for rank in range(dp)]
    result = []
    for _ in range(count):
        per_rank = [
            [next(batches)["sample_ids"] for _ in range(batches.micro_batches_per_step)] for batches in ranks
        ]
        result.append([id for j in range(len(per_rank[0])) for rank in per_rank for id in rank[j]])
    return result


@pytest.mark.parametrize(("micro", "dp"), itertools.product((1, 2, 3), (1, 2, 4)))
def test_every_layout_consumes_the_same_samples_in_the_same_order(micro, dp):
    expected = [list(range(step * GLOBAL, (step + 1) * GLOBAL)) for step in range(3)]
    assert steps(Numbered(1000), 0, micro, dp, 3) == expected


@pytest.mark.parametrize(("before", "after"), [((2, 4), (3, 1)), ((1, 1), (6, 4)), ((6, 2), (1, 3))])
def test_resuming_with_another_layout_goes_on_where_the_run_stopped(before, after):
    dataset = Numbered(1000)
    whole = steps(dataset, 0, 1, 1, 7)
    assert steps(dataset, 0, *before, 3) + steps(dataset, 3 * GLOBAL, *after, 4) == whole


def test_batches_hold_their_samples():
    batch = next(Batches(Numbered(100), 48, 3, 1, 2, GLOBAL))
    assert batch["sample_ids"] == [51, 52, 53]
    assert batch["tokens"].tolist() == [[id] * SEQ for id in batch["sample_ids"]]
    assert batch["labels"].tolist() == [[id + 1] * SEQ for id in batch["sample_ids"]]
    assert {
        name: (tuple(batch[name].shape), batch[name].dtype) for name in batch if name != "sample_ids"
    } == {
        "tokens": ((3, SEQ), torch.int64),
        "labels": ((3, SEQ), torch.int64),
        "loss_mask": ((3, SEQ), torch.float32),
        "position_ids": ((3, SEQ), torch.int64),
    }


def test_ends_with_the_last_whole_global_batch():
    batches = Batches(Numbered(3 * GLOBAL - 1), 0, 4, 0, 2, GLOBAL)
    assert len(list(batches)) == 2 * batches.micro_batches_per_step
    assert list(batches) == []


def test_errors_in_reading_reach_the_reader():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 5:
                raise OSError("disk gone")
            return super().__getitem__(index)

    batches = Batches(Broken(100), 0, 1, 0, 1, GLOBAL)
    assert [next(batches)["sample_ids"] for _ in range(5)] == [[0], [1], [2], [3], [4]]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_ids_beyond_the_vocabulary_name_the_sample():
    batches = Batches(Numbered(100), 0, 2, 0, 1, GLOBAL, vocab_size=4)
    assert next(batches)["sample_ids"] == [0, 1]
    with pytest.raises(UserError, match="sample 3 of the data holds token 4, .* has 4"):
        next(batches)


def test_an_indivisible_global_batch_is_refused():
    with pytest.raises(UserError, match="train.global_batch_size = 24 .* 5 x 2"):
        Batches(Numbered(100), 0, 5, 0, 2, GLOBAL)


def reader_threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_the_thread_starts_with_the_first_batch_reads_little_ahead_and_goes_with_its_owner():
    class Counting(Numbered):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    before, dataset = reader_threads(), Counting(10_000)
    batches = Batches(dataset, 0, 1, 0, 1, GLOBAL)
    assert reader_threads() == before and batches.wait_seconds == 0
    next(batches)
    thread = batches._thread
    thread.join(timeout=0.5)
    assert thread.is_alive() and dataset.read <= 1 + 4 + 1  # taken, waiting, in hand
    assert batches.wait_seconds > 0
    del batches
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_closing_stops_the_iteration():
    batches = Batches(Numbered(100), 0, 1, 0, 1, GLOBAL)
    next(batches)
    batches.close()
    assert list(batches) == []
