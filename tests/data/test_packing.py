"""First fit, rows as batches, and resuming by the number of rows."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.data.chat import Encoded
from solar_mega.data.packing import PackedRows, RowFeed, pack, packed_batch


def _first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """As the definition says, in quadratic time."""
    bins, room = [], []
    for i, length in enumerate(lengths):
        at = next((j for j, left in enumerate(room) if left >= length), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(i)
        room[at] -= length
    return bins


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_pack_is_first_fit(lengths, capacity) -> None:
    assert pack(lengths, capacity) == _first_fit(lengths, capacity)


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="item 1 has length 9; allowed: 1 to 8"):
        pack([8, 9], 8)
    with pytest.raises(ValueError, match="item 0 has length 0"):
        pack([0], 8)


def test_many_short_samples_leave_little_room() -> None:
    lengths = [random.Random(1).randint(20, 400) for _ in range(3000)]
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.98


def _sample(*ids: int, answer: int) -> Encoded:
    """The last `answer` tokens are in the loss."""
    loss = np.arange(len(ids)) >= len(ids) - answer
    return Encoded(np.array(ids, dtype=np.int32), loss)


def test_a_row_as_a_batch() -> None:
    batch = packed_batch([_sample(1, 5, 6, 7, 2, answer=2), _sample(1, 8, 2, answer=1)], 8, pad_id=2)
    assert batch["tokens"].tolist() == [[1, 5, 6, 7, 1, 8, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7, 2, 8, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    # EOS counts where it is an answer's, not where the same token pads
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 6, 8]


def test_full_and_empty_rows() -> None:
    assert packed_batch([_sample(1, 5, 2, answer=1)], 2, 0)["cu_seqlens"].tolist() == [0, 2]
    empty = packed_batch([], 3, 0)
    assert empty["cu_seqlens"].tolist() == [0, 3] and empty["loss_mask"].sum() == 0
    with pytest.raises(ValueError, match="samples of 4 places in a row of 3"):
        packed_batch([_sample(1, 5, 6, 7, 2, answer=1)], 3, 0)


@pytest.mark.parametrize("together", [True, False])
def test_every_pass_has_every_sample_once(together) -> None:
    lengths = [random.Random(i).randint(2, 60) for i in range(50)]
    rows = PackedRows(lengths, 64, seed=3, together=together)
    one, two = rows.rows_in(1), rows.rows_in(2)
    first = [rows[r] for r in range(one)]
    second = [rows[r] for r in range(one, two)]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(50))
    assert first != second
    assert all(sum(lengths[i] - 1 for i in row) <= 64 for row in first)
    assert rows.rows_in(1.5) == one + -(-(two - one) // 2)
    if not together:
        assert one == 50


def test_a_row_does_not_depend_on_what_was_asked_before() -> None:
    lengths = [random.Random(i).randint(2, 60) for i in range(50)]
    forward = PackedRows(lengths, 64, seed=3)
    want = [forward[r] for r in range(80)]
    for r in (79, 3, 41, 0):
        assert PackedRows(lengths, 64, seed=3)[r] == want[r]


def _feed(rows, samples, rank: int, size: int, first_row: int = 0) -> RowFeed:
    return RowFeed(rows, samples, first_row=first_row, dp_rank=rank, dp_size=size, seq_length=64, pad_id=0)


def test_ranks_share_rows_and_resume_by_their_number() -> None:
    samples = [
        _sample(*range(1, n + 1), answer=1) for n in (random.Random(5).randint(2, 60) for _ in range(30))
    ]
    rows = PackedRows([len(s) for s in samples], 64, seed=1)
    alone = [b["tokens"] for b in itertools.islice(_feed(rows, samples, 0, 1), 24)]
    shared = [iter(_feed(rows, samples, rank, 2, first_row=8)) for rank in range(2)]
    for want in alone[8:]:
        feed = shared[0] if (got := next(shared[0], None)) is not None else shared[1]
        assert (got["tokens"] == want).all()
        shared = [shared[1], feed]


def test_a_list_of_rows_ends_in_padding() -> None:
    feed = _feed([[0]], [_sample(1, 5, 2, answer=2)], 0, 1)
    assert [b["loss_mask"].sum().item() for b in itertools.islice(feed, 3)] == [2, 0, 0]
