import numpy as np
import pytest

from solar_mega.data.indexed import CorpusWriter, open_corpus, token_dtype
from solar_mega.errors import UserError

DOCUMENTS = [[5, 6, 2], [2], list(range(700)) + [2], [9, 2]]


def write(prefix, documents, dtype=np.uint16, description=None):
    with CorpusWriter(prefix, dtype) as writer:
        for half in (documents[:3], documents[3:]):
            ids = np.array([id for document in half for id in document], dtype)
            writer.add(ids.tobytes(), np.array([len(document) for document in half], np.int32))
        writer.commit(description or {})
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_same_bytes_as_megatron_writes_and_megatron_reads_them(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = write(tmp_path / "ours", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    stock = IndexedDataset(str(ours))
    assert [stock[i].tolist() for i in range(len(stock))] == DOCUMENTS


def test_the_dtype_is_megatrons_choice():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (256, 32000, 65499, 65500, 65536, 128256):
        assert token_dtype(size) is DType.optimal_dtype(size)


def test_reading_back(tmp_path):
    corpus = open_corpus(write(tmp_path / "c", DOCUMENTS))
    lengths = [len(document) for document in DOCUMENTS]
    assert (corpus.sequences, corpus.tokens) == (4, sum(lengths))
    for first in range(5):
        for last in range(first, 5):
            assert corpus.tokens_between(first, last) == sum(lengths[first:last])
    assert corpus.read_tokens(2, 3).tolist() == [2, 2, 0]
    assert corpus.read_tokens(corpus.tokens - 1, 100).tolist() == [2]


def test_damaged_corpora_are_named(tmp_path):
    prefix = write(tmp_path / "c", DOCUMENTS)
    with pytest.raises(UserError, match=r"c\.bin\.bin and .*c\.bin\.idx not found; give the name without"):
        open_corpus(tmp_path / "c.bin")
    data = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(data[:-2])
    with pytest.raises(
        UserError, match=rf"c\.bin is cut short: {len(data) - 2} bytes, .* describes {len(data)}"
    ):
        open_corpus(prefix)
    (tmp_path / "c.bin").write_bytes(data + b"12")
    with pytest.raises(UserError, match="does not belong to its index"):
        open_corpus(prefix)
    (tmp_path / "c.bin").write_bytes(data)
    index = (tmp_path / "c.idx").read_bytes()
    (tmp_path / "c.idx").write_bytes(index[:-1])
    with pytest.raises(UserError, match=r"c\.idx is cut short"):
        open_corpus(prefix)
    (tmp_path / "c.idx").write_bytes(b"x" * len(index))
    with pytest.raises(UserError, match="not a Megatron index"):
        open_corpus(prefix)
    (tmp_path / "c.idx").unlink()
    with pytest.raises(UserError, match=r"c\.idx not found"):
        open_corpus(prefix)


def test_nothing_stands_before_commit_and_nothing_stays_without_it(tmp_path):
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.array([1, 2], np.uint16).tobytes(), np.array([2], np.int32))
        assert not list(tmp_path.glob("c.*"))
        with (
            pytest.raises(UserError, match="being written by another run"),
            CorpusWriter(tmp_path / "c", np.uint16),
        ):
            pass
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_refused_second_writer_does_not_disturb_the_first(tmp_path):
    with CorpusWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.array([1, 2], np.uint16).tobytes(), np.array([2], np.int32))
        with pytest.raises(UserError), CorpusWriter(tmp_path / "c", np.uint16):
            pass
        writer.commit({})
    assert open_corpus(tmp_path / "c").tokens == 2
