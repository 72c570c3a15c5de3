"""Samples by where they lie in the corpora: named rightly, and drawn alike however a run is cut."""

import numpy as np
import pytest

from solar_mega.config.schema import DataConfig
from solar_mega.data.batches import Batches
from solar_mega.data.locate import locate
from tests.data.test_datasets import EOS, SEQ, build, make_corpus

GLOBAL = 12


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Two corpora of distinct tokens, 3 to 1: (configuration, tokens of each by path)."""
    root = tmp_path_factory.mktemp("blend")
    tokens = {
        str(root / "a"): make_corpus(root / "a", 60, 1_000),
        str(root / "b"): make_corpus(root / "b", 40, 9_000),
    }
    return DataConfig(train=(f"0.75 {root / 'a'}", f"0.25 {root / 'b'}")), tokens


def test_located_samples_hold_the_tokens_that_lie_there(blend):
    data, tokens = blend
    dataset, _ = build(data, train=300)
    corpora, epochs = set(), set()
    for index in range(0, 300, 7):
        place = locate(dataset, index)
        assert place["sample"] is not None and place["first_document"] >= 0
        whole = tokens[place["corpus"]]
        ends = np.flatnonzero(whole == EOS)
        begin = 0 if place["first_document"] == 0 else ends[place["first_document"] - 1] + 1
        sample = dataset[index]["tokens"].numpy()
        inside = sample[: min(SEQ, ends[place["first_document"]] + 1 - begin - place["offset"])]
        assert (whole[begin + place["offset"] :][: len(inside)] == inside).all()
        corpora.add(place["corpus"])
        epochs.add(place["epoch"])
    assert len(corpora) == 2 and len(epochs) > 1


def _drawn(dataset, consumed: int, micro: int, dp: int, steps: int) -> list[list[tuple]]:
    """[step] -> places of its samples in the order of the global batch, gathered over the replicas."""
    ranks = [Batches(dataset, consumed, micro, rank, dp, GLOBAL) for rank in range(dp)]
    drawn = []
    for _ in range(steps):
        parts = [[next(rank)["sample_ids"] for rank in ranks] for _ in range(ranks[0].micro_batches_per_step)]
        ids = [sample for replicas in parts for given in replicas for sample in given]
        drawn.append([tuple(locate(dataset, sample).items())[1:] for sample in ids])
    return drawn


def test_blends_resumed_on_other_replicas_draw_the_same_samples_in_the_same_order(blend):
    """Cut twice, with other numbers of replicas and micro-batches, and lengthened on the way."""
    data, _ = blend
    whole = _drawn(build(data, train=10 * GLOBAL)[0], 0, 1, 1, 10)
    pieces = (
        _drawn(build(data, train=5 * GLOBAL)[0], 0, 2, 2, 3)
        + _drawn(build(data, train=10 * GLOBAL)[0], 3 * GLOBAL, 1, 4, 4)
        + _drawn(build(data, train=12 * GLOBAL)[0], 7 * GLOBAL, 4, 3, 3)
    )
    assert pieces == whole
    flat = [place for step in whole for place in step]
    assert len(flat) == 10 * GLOBAL
    assert 0.7 < sum(dict(place)["corpus"].endswith("a") for place in flat) / len(flat) < 0.8
