"""Saves in the background, hashes, damage and falling back, on two data-parallel ranks."""

import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from solar_mega.checkpoint.optimizer_shards import boxes
from solar_mega.checkpoint.resume import newest_sound, newest_whole
from solar_mega.checkpoint.run_state import check_hashes
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from tests.checkpoint import training
from tests.distributed import run_ranks
from tests.families import make_family
from tests.ranks import layout


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 2, 4)])
def test_boxes_are_the_flat_range(shape):
    """Every range of every shape, against the flat index of each element."""
    import itertools
    import math

    for start in range(math.prod(shape) + 1):
        for stop in range(start, math.prod(shape) + 1):
            seen = []
            for offset, size in boxes(shape, start, stop):
                for place in itertools.product(*(range(o, o + s) for o, s in zip(offset, size, strict=True))):
                    flat = 0
                    for index, extent in zip(place, shape, strict=True):
                        flat = flat * extent + index
                    seen.append(flat)
            assert seen == list(range(start, stop))
            assert len(list(boxes(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


def _save_both_ways(source, root):
    """The same states saved synchronously and in the background while training goes on; what came out."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.megatron import load_checkpoint
    from solar_mega.checkpoint.saver import Saver
    from solar_mega.model.architecture import Architecture

    hf = HFDirectory(source)
    arch, identity = Architecture.from_hf(hf.config), LayerMap.parse("identity", 4)
    seen = {}
    with layout(distributed_optimizer=True) as parallel:
        run = training.start(arch, parallel, "bf16-dist", hf.tensors, arch, identity)
        plain = Saver(CheckpointStore(root / "sync", keep=9))
        beside = Saver(CheckpointStore(root / "async", keep=9), asynchronous=True)
        for step in (1, 2, 3, 4):  # from the third on, plans are remembered
            run.steps(step - 1, 1)
            plain.save(run.chunks, run.optimizer, run.state(step))
            assert beside.save(run.chunks, run.optimizer, run.state(step)) is None
            assert beside.pending == step
        went_on = run.steps(4, 2)  # while step 4 is being written
        seen["committed"] = beside.wait()
        assert beside.pending is None and beside.poll() is None
        again = training.start(arch, parallel, "bf16-dist")
        state = load_checkpoint(beside.store.path(4), again.chunks, again.optimizer)
        again.trainer.schedule.load_state_dict(state.schedule)
        seen["compared"] = training.differences(beside.store.path(4), again, identity)
        seen["same run"] = went_on == again.steps(4, 2)
        seen["limited"] = _under_a_limit(run, beside)
        run.steps(6, 1)
        beside.save(run.chunks, run.optimizer, run.state(7))
        seen["killed"] = _with_a_killed_writer(run, beside)
        beside.save(run.chunks, run.optimizer, run.state(9))
        beside.close()
        seen["steps"] = beside.store.steps()
    return seen


def _under_a_limit(run, saver) -> str:
    """The error of a save in the background that no file of its size is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        saver.save(run.chunks, run.optimizer, run.state(6))
        with pytest.raises(UserError) as caught:
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(caught.value)


def _with_a_killed_writer(run, saver) -> str:
    """The error when rank 1's writing process dies (out of memory, say)."""
    saver.wait()
    rank = int(os.environ["RANK"])
    if rank == 1:
        import solar_mega.checkpoint.saver as module

        module.write_beside = _die
    saver.save(run.chunks, run.optimizer, run.state(8))
    with pytest.raises(UserError) as caught:
        saver.wait()
    if rank == 1:
        from solar_mega.checkpoint.writing import write_beside

        module.write_beside = write_beside
    return str(caught.value)


def _die(*unused, **options):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def both(root, tmp_path_factory):
    source = make_family("llama3", tmp_path_factory.mktemp("source"), 4)
    return run_ranks(_save_both_ways, 2, source, root)


def test_both_ways_write_the_same_bytes(both, root):
    """All but the directory's own name, which Megatron stores in `.metadata`."""
    for step in (1, 2, 3, 4):
        sync, beside = (CheckpointStore(root / way).path(step) for way in ("sync", "async"))
        names = sorted(file.name for file in sync.iterdir())
        assert names == sorted(file.name for file in beside.iterdir())
        assert sum(name.endswith(".distcp") for name in names) == 4  # both ranks write
        for name in names:
            if name.endswith(".distcp") or name == "common.pt":
                assert (sync / name).read_bytes() == (beside / name).read_bytes(), (step, name)


def test_a_background_save_is_of_the_moment_it_was_asked_for(both, root):
    for seen in both:
        compared, wrong = seen["compared"]
        assert compared > 10 and not wrong
        assert seen["same run"]
        assert seen["committed"] == CheckpointStore(root / "async").path(4)


def test_failures_in_the_background_reach_all_ranks(both, root):
    assert "would be larger" in both[0]["limited"] and "step-00000006" in both[0]["limited"]
    assert "older ones are untouched" in both[0]["limited"] and "rank 0 failed" in both[1]["limited"]
    assert "was it killed?" in both[0]["killed"] and "rank 0 failed" in both[1]["killed"]
    for seen in both:
        assert seen["steps"] == [1, 2, 3, 4, 7, 9]  # and saving went on
    assert not list((root / "async").glob(".step*"))


def flip(file: Path) -> None:
    """One bit in the middle."""
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture
def store(both, root, tmp_path):
    shutil.copytree(root / "sync", tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints", keep=9)


def sound(store, fallback, verify=True):
    chosen = newest_whole(store, fallback)
    if chosen is None:
        return None
    from tests.train.tiny import one_rank

    with one_rank():
        return newest_sound(store, chosen, verify, fallback)


def test_hashes_name_the_flipped_file(store):
    check_hashes(store.path(4))
    flip(store.path(4) / "__1_0.distcp")
    shares = []
    for part in range(3):
        try:
            check_hashes(store.path(4), part, 3)
        except UserError as error:
            shares.append(str(error))
    assert len(shares) == 1 and "__1_0.distcp does not hold what was written" in shares[0]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: flip(path / "__0_1.distcp"), "__0_1.distcp does not hold what was written"),
        (lambda path: flip(path / ".metadata"), ".metadata does not hold"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "run_state.json").unlink(), "run_state.json"),
        (lambda path: (path / "run_state.json").write_text("{}"), "run_state.json is damaged"),
    ],
    ids=["flipped byte", "flipped index", "missing file", "missing state", "bad state"],
)
def test_damage_is_an_error_unless_told_to_fall_back(store, damage, words, capsys):
    damage(store.path(4))
    with pytest.raises(UserError) as caught:
        sound(store, fallback=False)
    assert words in str(caught.value) and "checkpoint.fallback = true" in str(caught.value)
    assert store.steps() == [1, 2, 3, 4]
    assert sound(store, fallback=True) == store.path(3)
    said = capsys.readouterr().out
    assert words in said and "set aside" in said
    assert store.steps() == [1, 2, 3] and store.latest() == store.path(3)
    assert (store.root / "step-00000004.damaged").is_dir()


def test_unverified_resumes_do_not_read(store):
    flip(store.path(4) / "__0_1.distcp")
    assert sound(store, fallback=False, verify=False) == store.path(4)


def test_nothing_sound_is_an_error(store):
    for step in store.steps():
        (store.path(step) / "common.pt").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        sound(store, fallback=True)


def test_pruning_does_not_outlive_the_process(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        (store.partial(step) / "data").write_text("x")
        store.commit(step)
    deadline = time.monotonic() + 20
    while list(tmp_path.glob(".step*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert not any(thread.daemon for thread in threading.enumerate() if "rmtree" in thread.name)
