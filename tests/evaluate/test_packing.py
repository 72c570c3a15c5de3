"""What goes through the model together must still be, for every request, its own sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.evaluate.attention import suffix_mask
from solar_mega.evaluate.packing import GroupLayout, Request, make_batches

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)  # few ids, so that beginnings coincide
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12)


def seen_by(batch, row: int) -> list[int]:
    """Tokens up to place `row` of a batch that its sequence consists of."""
    for group in batch.groups:
        if not group.start <= row < group.start + group.size:
            continue
        prefix = list(range(group.start, group.start + group.prefix))
        if row < group.start + group.prefix:
            return list(range(group.start, row + 1))
        begin = group.start + group.prefix
        for length in group.suffixes:
            if row < begin + length:
                return prefix + list(range(begin, row + 1))
            begin += length
    raise AssertionError("no group has this place")


@given(REQUESTS, st.integers(12, 40), st.sampled_from([20, 64, 1000]))
def test_every_request_is_scored_on_its_own_sequence(pairs, max_length, batch_tokens):
    answered = {}
    for batch in make_batches([Request(*pair) for pair in pairs], max_length, batch_tokens):
        at = 0
        for number, count in zip(batch.requests, batch.counts, strict=True):
            context, continuation = pairs[number]
            tokens = (context + continuation)[-(max_length + 1) :][:-1]
            assert list(batch.targets[at : at + count]) == continuation
            for offset, row in enumerate(batch.rows[at : at + count]):
                places = seen_by(batch, row)
                end = len(tokens) - count + offset + 1
                assert list(batch.tokens[places]) == tokens[:end]
                assert list(batch.positions[places]) == list(range(end))
            answered[number] = True
            at += count
        assert at == len(batch.rows) and sum(group.size for group in batch.groups) == len(batch.tokens)
    assert sorted(answered) == list(range(len(pairs)))


def test_common_contexts_are_computed_once():
    context = list(range(100))
    requests = [Request(context, [200 + choice, 7, 8]) for choice in range(4)]
    (batch,) = make_batches(requests, 512, 1024)
    assert len(batch.tokens) == 100 + 4 * 2


def test_equal_inputs_with_other_answers_are_computed_once():
    requests = [Request(list(range(50)), [200 + choice]) for choice in range(4)]
    (batch,) = make_batches(requests, 512, 1024)
    assert len(batch.tokens) == 50 and len(batch.rows) == 4 and len(set(batch.rows)) == 1


@pytest.mark.parametrize("request_", [Request([], [1]), Request([1], []), Request([1], [1] * 9)])
def test_what_cannot_be_scored_is_refused(request_):
    with pytest.raises(ValueError, match="request 0 has"):
        make_batches([request_], 8, 64)


@given(st.integers(0, 6), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([None, 1, 3]))
def test_suffix_mask_against_its_definition(prefix, suffixes, window):
    mask = suffix_mask(GroupLayout(0, prefix, tuple(suffixes)), window).numpy()
    owner = [-1] * prefix + [i for i, length in enumerate(suffixes) for _ in range(length)]
    position = [*range(prefix)] + [prefix + j for length in suffixes for j in range(length)]
    expected = np.zeros((len(owner) - prefix, len(owner)), dtype=bool)
    for i in range(prefix, len(owner)):
        for j in range(len(owner)):
            same = owner[j] in (-1, owner[i]) and position[j] <= position[i]
            expected[i - prefix, j] = same and (window is None or position[i] - position[j] < window)
    assert (mask == expected).all()
