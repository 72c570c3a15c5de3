"""The store: complete or absent, latest after commit, never fewer than two."""

import pytest

from solar_mega.checkpoint.store import CheckpointStore


def commit(store, step, content="x"):
    (store.partial(step) / "data").write_text(content)
    return store.commit(step)


def test_commit_makes_it_the_latest(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    assert store.latest() is None and store.steps() == []
    path = commit(store, 120)
    assert path.name == "step-00000120" and (path / "data").read_text() == "x"
    assert store.latest() == path
    assert (store.root / "latest").read_text() == "step-00000120\n"


def test_a_partial_checkpoint_is_not_one(tmp_path):
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    place = store.partial(2)
    (place / "data").write_text("half")
    assert store.steps() == [1] and store.latest() == store.path(1)
    store.partial(3)  # a later save removes what the killed one left
    assert not place.exists() and store.steps() == [1]
    store.discard(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("keep, kept", [(0, [30, 40]), (1, [30, 40]), (2, [30, 40]), (3, [20, 30, 40])])
def test_pruning_keeps_the_newest_complete_ones(tmp_path, keep, kept):
    store = CheckpointStore(tmp_path, keep)
    for step in (10, 20, 30, 40):
        store.partial(step + 1)  # never counted
        commit(store, step)
    assert store.steps() == kept


def test_latest_is_never_pruned_after_going_back(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        commit(store, step)
    (tmp_path / "latest").write_text("step-00000010\n")
    assert store.latest() == store.path(10)
    commit(store, 15)
    assert store.steps() == [15, 20] and store.latest() == store.path(15)


def test_the_same_step_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path)
    commit(store, 5, "old")
    commit(store, 5, "new")
    assert store.steps() == [5] and (store.path(5) / "data").read_text() == "new"
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_text(""), "is damaged"),
        (lambda f: f.write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: f.write_text("step-00000099\n"), "names step-00000099, which does not exist"),
        (lambda f: f.write_text("../elsewhere\n"), "is damaged"),
    ],
)
def test_a_damaged_latest_falls_back_and_says_so(tmp_path, capsys, damage, says):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        commit(store, step)
    damage(tmp_path / "latest")
    assert store.latest() == store.path(2)
    out = capsys.readouterr().out
    assert says in out and "step-00000002" in out
