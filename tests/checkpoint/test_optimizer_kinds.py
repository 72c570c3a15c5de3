"""Resuming with the other setting of `parallel.distributed_optimizer`, and with communication overlapped: the
run goes on as if nothing had happened.

Tolerance: the same numbers are added and updated, but the norm, by which gradients are clipped, is summed in
another order when states are sharded: a few units of 2^-24 of each step.
"""

from dataclasses import replace

import pytest

from solar_mega.config.schema import ParallelConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from tests.checkpoint import training
from tests.distributed import run_ranks
from tests.families import make_family
from tests.ranks import layout

LAYERS, STEPS = 2, 2
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1)
RUNS = [  # (precision, writer is distributed and overlaps, reader is distributed and overlaps)
    ("fp32", (True, False), (False, False)),
    ("fp32", (False, False), (True, True)),
    ("bf16", (True, True), (False, False)),
    ("bf16", (False, False), (True, False)),
    ("fp32", (True, True), (True, True)),
    ("bf16", (True, True), (True, False)),
]


def _go_on(source, root) -> list[tuple]:
    """Of each run: the writer's steps after its checkpoint, the reader's, the reader's step counters."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.megatron import load_checkpoint, save_checkpoint
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture

    weights = HFDirectory(source)
    arch, identity = Architecture.from_hf(weights.config), LayerMap.parse("identity", LAYERS)
    found = []
    with layout():
        for number, (precision, writer, reader) in enumerate(RUNS):
            run = _start(arch, precision, writer, weights.tensors, identity)
            run.steps(0, STEPS)
            run.trainer.gather_weights()
            store = CheckpointStore(root / str(number))
            path = save_checkpoint(store, run.chunks, run.optimizer, run.state(STEPS))
            went_on = run.steps(STEPS, 3)
            again = _start(arch, precision, reader)
            state = load_checkpoint(path, again.chunks, again.optimizer)
            again.trainer.schedule.load_state_dict(state.schedule)
            counts = training.step_counts(again)
            found.append((went_on, again.steps(STEPS, 3), counts))
        other = _start(arch, "bf16", (False, False))
        try:
            load_checkpoint(root / "0" / f"step-{STEPS:08d}", other.chunks, other.optimizer)
        except UserError as error:
            found.append(str(error))
    return found


def _start(arch, precision: str, settings: tuple[bool, bool], *source):
    distributed, overlaps = settings
    parallel = ParallelConfig(distributed_optimizer=distributed)
    if overlaps:
        parallel = replace(parallel, **OVERLAP)
    kind = f"{precision}-dist" if distributed else precision
    where = (source[0], arch, source[1]) if source else ()
    return training.start(arch, parallel, kind, *where)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    source = make_family("llama3", tmp_path_factory.mktemp("source"), LAYERS)
    return run_ranks(_go_on, 2, source, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[str(run) for run in RUNS])
def test_a_run_goes_on_under_the_other_setting(results, number):
    for rank in results:
        went_on, again, (counts, separate) = rank[number]
        assert counts == {float(STEPS)} and separate
        for mine, theirs in zip(again, went_on, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


def test_the_precision_may_not_change_with_it(results):
    for rank in results:
        assert "holds weights in float32, this run trains bfloat16: set train.precision as it was" in rank[-1]
