import dataclasses

import numpy as np
import pytest

from solar_mega.config.schema import DataConfig
from solar_mega.data.corpora import check_corpora
from solar_mega.data.datasets import build_datasets
from solar_mega.data.indexed import CorpusWriter
from solar_mega.errors import UserError
from tests.distributed import run_ranks

SEQ = 8
EOS = 2


def make_corpus(prefix, documents: int, base: int, description=None, seed=0):
    """Documents of 2 to 30 tokens; every token but EOS occurs once in the corpus: base, base + 1, ..."""
    lengths = np.random.default_rng(seed).integers(2, 31, documents).astype(np.int32)
    tokens = np.arange(base, base + lengths.sum(), dtype=np.int32)
    tokens[np.cumsum(lengths) - 1] = EOS
    with CorpusWriter(prefix, np.int32) as writer:
        writer.add(tokens.tobytes(), lengths)
        writer.commit(description or {})
    return tokens


def samples(dataset, count=None):
    return np.stack([dataset[i]["tokens"].numpy() for i in range(len(dataset) if count is None else count)])


def build(data, train=40, valid=0, seed=1, cache=None, **options):
    return build_datasets(data, SEQ, train, valid, seed, EOS, cache, **options)


def test_an_epoch_shows_every_token_once_and_labels_are_the_next_tokens(tmp_path):
    tokens = make_corpus(tmp_path / "c", 50, 1000)
    per_epoch = (len(tokens) - 1) // SEQ
    dataset, none = build(DataConfig(train=(str(tmp_path / "c"),)), train=3 * per_epoch)
    assert none is None and len(dataset) == 3 * per_epoch
    orders = []
    for epoch in range(3):
        seen = [dataset[epoch * per_epoch + i] for i in range(per_epoch)]
        inputs = np.concatenate([sample["tokens"].numpy() for sample in seen])
        labels = np.concatenate([sample["labels"].numpy() for sample in seen])
        for which in (inputs, labels):
            words = which[which != EOS]
            assert len(set(words)) == len(words) == len(which) - (which == EOS).sum()
        # left out: the first token as a label, the last as an input, the rest that fills no sample
        assert len(inputs) == per_epoch * SEQ > len(tokens) - 1 - SEQ
        for sample in seen:
            assert (sample["labels"][:-1] == sample["tokens"][1:]).all()
            assert (sample["loss_mask"] == 1).all() and sample["loss_mask"].dtype.is_floating_point
            assert sample["position_ids"].tolist() == list(range(SEQ))
            following = (sample["tokens"] != EOS) & (sample["labels"] != EOS)
            assert (sample["labels"] - sample["tokens"])[following].eq(1).all()
        orders.append(inputs.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_sample_i_does_not_depend_on_the_length_of_the_run(tmp_path):
    """A run extended after the fact sees the samples that a longer run would have seen. Megatron's own order
    changes with the number of epochs."""
    make_corpus(tmp_path / "a", 40, 1000)
    make_corpus(tmp_path / "b", 15, 100_000, seed=1)
    for train in (
        (f"{tmp_path}/a",),
        (f"0.7 {tmp_path}/a", f"0.3 {tmp_path}/b"),
        (f"{tmp_path}/a", f"{tmp_path}/b"),
    ):
        short, _ = build(DataConfig(train=train), train=60)
        long, _ = build(DataConfig(train=train), train=500)
        assert len(short) == 60 and len(long) == 500
        assert (samples(short) == samples(long, 60)).all()


def test_the_seed_orders_training_and_leaves_validation_alone(tmp_path):
    make_corpus(tmp_path / "c", 200, 1000)
    data = DataConfig(train=(str(tmp_path / "c"),), split=(0.8, 0.2))
    first, again, other = (build(data, valid=10, seed=seed) for seed in (1, 1, 2))
    assert (samples(first[0]) == samples(again[0])).all()
    assert (samples(first[0]) != samples(other[0])).any()
    assert (samples(first[1]) == samples(other[1])).all()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (9, 1), (1, 1)])
def test_blends_honour_weights(tmp_path, weights):
    make_corpus(tmp_path / "a", 40, 1000)
    make_corpus(tmp_path / "b", 40, 100_000, seed=1)
    train = tuple(f"{weight} {tmp_path}/{name}" for weight, name in zip(weights, "ab", strict=True))
    dataset, _ = build(DataConfig(train=train), train=1000)
    share = (samples(dataset).max(axis=1) < 100_000).cumsum() / np.arange(1, 1001)
    exact = weights[0] / sum(weights)
    # at every moment of the run, not only at its end: never more than one sample off
    assert (np.abs(share - exact) * np.arange(1, 1001) <= 1).all()


def test_without_weights_tokens_count(tmp_path):
    sizes = [
        len(make_corpus(tmp_path / name, n, 1000 * 100**i, seed=i))
        for i, (name, n) in enumerate((("a", 90), ("b", 30)))
    ]
    dataset, _ = build(DataConfig(train=(f"{tmp_path}/a", f"{tmp_path}/b")), train=400)
    share = (samples(dataset).max(axis=1) < 100_000).mean()
    assert abs(share - sizes[0] / sum(sizes)) <= 1 / 400


def test_many_corpora_never_run_out(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        make_corpus(tmp_path / f"c{i}", 5, 1000, seed=i)
    for _ in range(10):
        weights = rng.dirichlet(np.full(7, 0.3)) + 1e-4
        train = tuple(f"{weight} {tmp_path}/c{i}" for i, weight in enumerate(weights))
        dataset, _ = build(DataConfig(train=train), train=int(rng.integers(1, 300)))
        samples(dataset)


def test_split_by_documents_is_disjoint_and_valid_corpora_replace_it(tmp_path):
    make_corpus(tmp_path / "c", 200, 1000)
    make_corpus(tmp_path / "v", 20, 100_000)
    train, valid = build(DataConfig(train=(str(tmp_path / "c"),), split=(9, 1)), train=300, valid=60)
    seen, held_out = (set(samples(which).ravel()) - {EOS} for which in (train, valid))
    assert seen and held_out and not seen & held_out
    train, valid = build(
        DataConfig(train=(str(tmp_path / "c"),), valid=(str(tmp_path / "v"),)), train=300, valid=7
    )
    assert len(valid) == 7 and samples(valid).max() >= 100_000
    assert max(samples(train).ravel()) > max(seen), "all documents train when validation has its own"


def test_cached_indices_give_the_same_samples_and_notice_a_new_corpus(tmp_path):
    cache = tmp_path / "cache"
    data = DataConfig(train=(str(tmp_path / "c"),))
    make_corpus(tmp_path / "c", 60, 1000)
    plain, _ = build(data, train=200)
    cached, _ = build(data, train=200, cache=cache, cached_from=0)
    assert (samples(plain) == samples(cached)).all()
    built = sorted(cache.iterdir())
    assert len(built) == 2 and not any("partial" in path.name for path in built)
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    again, _ = build(data, train=200, cache=cache, cached_from=0)
    assert (samples(plain) == samples(again)).all()
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}, "built twice"
    make_corpus(tmp_path / "c", 60, 1000, seed=5)
    changed, _ = build(data, train=200, cache=cache, cached_from=0)
    assert (samples(changed) == samples(build(data, train=200)[0])).all()
    assert sorted(cache.iterdir()) != built


def _on_ranks(directory):
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.runtime.parallel import running

    with running(ParallelConfig(), seed=1, threads=1):
        data = DataConfig(train=(f"3 {directory}/a", f"1 {directory}/b"), split=(0.8, 0.2))
        train, valid = build(data, train=100, valid=10, cache=directory / "cache", cached_from=0)
        return samples(train), samples(valid)


@pytest.mark.slow
def test_ranks_share_one_cache_and_agree_with_a_single_process(tmp_path):
    make_corpus(tmp_path / "a", 60, 1000)
    make_corpus(tmp_path / "b", 60, 100_000, seed=1)
    data = DataConfig(train=(f"3 {tmp_path}/a", f"1 {tmp_path}/b"), split=(0.8, 0.2))
    train, valid = build(data, train=100, valid=10)
    for theirs in run_ranks(_on_ranks, 2, tmp_path):
        assert (theirs[0] == samples(train)).all() and (theirs[1] == samples(valid)).all()
    assert list((tmp_path / "cache").glob("*"))


def description(tokens, **tokenizer):
    maker = {"fingerprint": "f" * 32, "vocab_size": 5000, "eos_id": EOS, "name": "tok", **tokenizer}
    return {"tokens": tokens, "largest_id": 4000, "tokenizer": maker}


def test_all_corpus_errors_at_once(tmp_path):
    fine = len(make_corpus(tmp_path / "fine", 20, 100))
    make_corpus(tmp_path / "fine", 20, 100, description(fine))
    tiny = len(make_corpus(tmp_path / "tiny", 1, 100))
    make_corpus(tmp_path / "other", 20, 100, description(fine, fingerprint="0" * 32))
    make_corpus(tmp_path / "stale", 20, 100, description(1))
    make_corpus(tmp_path / "plain", 20, 4990)
    make_corpus(tmp_path / "cut", 20, 100)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-4])
    names = ("fine", "missing", "tiny", "other", "stale", "plain", "cut")
    data = DataConfig(train=tuple(f"1 {tmp_path}/{name}" for name in names), valid=(f"{tmp_path}/gone",))
    with pytest.raises(UserError) as caught:
        check_corpora(data, 256, vocab_size=5000, eos_id=EOS, fingerprint="f" * 32)
    message = str(caught.value)
    for part in (
        f"data.train: {tmp_path}/missing.bin and {tmp_path}/missing.idx not found",
        f"{tmp_path}/tiny has {tiny} tokens in 1 documents for training, fewer than one sample needs",
        'other was made with another tokenizer ("tok", 5000 tokens',
        "stale.json describes 1 tokens",
        f"plain holds token {4990 + fine - 2}, but the model's vocabulary has 5000",
        "cut.bin is cut short",
        "data.valid: ",
    ):
        assert part in message
    assert message.startswith("data: 7 problems")
    assert "fine" not in message.replace("confine", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "data.train names no corpus"),
        ({"train": ("0.5 {}/c", "{}/c")}, "give every corpus a weight or none"),
        ({"train": ("-1 {}/c",)}, "weights are positive numbers"),
        ({"train": ("nan {}/c",)}, "weights are positive numbers"),
        ({"split": (1.0, 0.0)}, "leaves validation nothing"),
        ({"split": (0.999, 0.001)}, "data.split: .* for validation, fewer than one sample"),
    ],
)
def test_unusable_blends_and_splits(tmp_path, change, message):
    make_corpus(tmp_path / "c", 50, 100)
    change = {
        key: tuple(v.format(tmp_path) if isinstance(v, str) else v for v in value)
        for key, value in change.items()
    }
    data = dataclasses.replace(DataConfig(train=(f"{tmp_path}/c",)), **change)
    with pytest.raises(UserError, match=message):
        check_corpora(data, SEQ)


def test_paths_may_hold_spaces(tmp_path):
    make_corpus(tmp_path / "a b", 50, 100)
    for entry in (f"{tmp_path}/a b", f"0.5 {tmp_path}/a b"):
        assert check_corpora(DataConfig(train=(entry,)), SEQ).train[0].corpus.sequences == 50
