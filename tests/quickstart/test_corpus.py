import json

import pytest

from solar_mega.errors import UserError
from solar_mega.quickstart import corpus
from solar_mega.quickstart.corpus import write_corpus


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_standard_library_split_by_file_and_repeatable(tmp_path):
    stats = write_corpus(tmp_path / "a", max_bytes=1_000_000)
    train, valid = read(tmp_path / "a" / "train.jsonl"), read(tmp_path / "a" / "valid.jsonl")
    assert (len(train), len(valid)) == (stats.train_files, stats.valid_files)
    assert not {document["path"] for document in train} & {document["path"] for document in valid}
    total = stats.train_bytes + stats.valid_bytes
    assert sum(len(document["text"].encode()) for document in train) == stats.train_bytes
    assert 0.9 * 1_000_000 < total <= 1_000_000
    assert stats.valid_bytes >= 0.05 * total
    assert not any("test" in document["path"].split("/") for document in train + valid)
    assert write_corpus(tmp_path / "b", max_bytes=1_000_000) == stats
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_corpus(tmp_path / "c", max_bytes=1_000_000, seed=1)
    assert (tmp_path / "c" / "train.jsonl").read_bytes() != (tmp_path / "a" / "train.jsonl").read_bytes()


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no Python source files"):
        write_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()
