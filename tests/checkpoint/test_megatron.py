"""Megatron checkpoints: any layout in, any layout out, through layer maps, optimizer states included."""

import contextlib
import io
import random

import numpy
import pytest
import torch

from solar_mega.depth.layer_map import LayerMap
from tests.checkpoint import training
from tests.checkpoint.training import KINDS
from tests.distributed import run_ranks
from tests.families import make_family
from tests.ranks import layout

LAYERS = 4
STEPS = 2
SIX, EIGHT = "dus:1", "dus:0"  # on one stage both copies of a source layer lie on the same rank


def _save(directory, root):
    """On TP2 x PP2, every kind of optimizer: train, save, go on; load, go on. Returns both continuations."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.megatron import load_checkpoint, save_checkpoint
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture

    source = HFDirectory(directory)
    arch = Architecture.from_hf(source.config)
    identity = LayerMap.parse("identity", LAYERS)
    results = {}
    for kind, (_, distributed) in KINDS.items():
        with layout(2, 2, distributed_optimizer=distributed) as parallel:
            run = training.start(arch, parallel, kind, source.tensors, arch, identity)
            run.steps(0, STEPS)
            path = save_checkpoint(CheckpointStore(root / kind), run.chunks, run.optimizer, run.state(STEPS))
            drawn = _draw_from_all()
            if kind == "fp32-dist":
                training.save_homogeneous(run, root / "homogeneous")
                save_checkpoint(CheckpointStore(root / "weights"), run.chunks, None, run.state(STEPS))
            went_on = run.steps(STEPS, 3)
            again = training.start(arch, parallel, kind)
            _draw_from_all()
            state = load_checkpoint(path, again.chunks, again.optimizer)
            again.trainer.schedule.load_state_dict(state.schedule)
            same_draws = drawn == _draw_from_all()
            counts = training.step_counts(again)
            compared = training.differences(path, again, identity)
            groups = [{k: v for k, v in g.items() if k != "params"} for g in again.optimizer.param_groups]
            results[kind] = (went_on, again.steps(STEPS, 3), same_draws, counts, compared, groups)
    return results


def _draw_from_all() -> list:
    """A number from every generator that a rank has."""
    from megatron.core import tensor_parallel

    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    for name in sorted(tensor_parallel.get_cuda_rng_tracker().get_states()):
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand(1).item())
    return drawn


def _load(root, targets):
    """(kind, spelling, layout) -> differing tensors, step counters, first losses."""
    from solar_mega.checkpoint.megatron import load_checkpoint, load_tensors, read_run_state
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.model.architecture import Architecture
    from solar_mega.runtime import parallel as parallel_group

    base = Architecture.from_hf(read_run_state(CheckpointStore(root / "fp32").latest()).hf_config)
    results = {}
    for kind, spelling, (tp, pp, vpp), homogeneous in targets:
        layer_map = LayerMap.parse(spelling, LAYERS)
        with layout(tp, pp, vpp, distributed_optimizer=KINDS[kind][1]) as parallel:
            run = training.start(base.grown(layer_map), parallel, kind)
            if homogeneous:
                path = root / "homogeneous"
                load_tensors(path, run.chunks, run.optimizer, layer_map)
            else:
                path = CheckpointStore(root / kind).latest()
                said = io.StringIO()
                grown = None if spelling == "identity" else layer_map
                with contextlib.redirect_stdout(said):
                    state = load_checkpoint(path, run.chunks, run.optimizer, grown)
                # A run that goes on elsewhere hears about its random streams; one that is grown starts anew.
                expected = grown is None and parallel_group.is_main()
                assert ("saved on tp=2 pp=2 vpp=1 dp=1" in said.getvalue()) == expected
                run.trainer.schedule.load_state_dict(state.schedule)
            compared = training.differences(path, run, layer_map)
            counts = training.step_counts(run)
            results[kind, spelling, (tp, pp, vpp), homogeneous] = (compared, counts, run.steps(STEPS, 2))
    return results


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_family("llama3", tmp_path_factory.mktemp("source"), LAYERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(source, root):
    return run_ranks(_save, 4, source, root)


FOUR_RANKS = [
    *[(kind, "identity", (1, 1, 1), False) for kind in KINDS],  # data parallel 4
    ("bf16-dist", "identity", (2, 1, 1), False),  # data parallel 2
    ("fp32-dist", "identity", (1, 2, 2), False),
    *[(kind, SIX, (1, 1, 1), False) for kind in KINDS],
    ("fp32", EIGHT, (1, 2, 2), False),
    ("bf16-dist", EIGHT, (1, 2, 2), False),
    ("bf16-dist", "3,2,1,0", (2, 2, 1), False),
    ("fp32-dist", "identity", (2, 1, 1), True),
    ("fp32-dist", SIX, (1, 1, 1), True),
    ("fp32-dist", "0,0,3,3", (2, 2, 1), True),  # layers 1 and 2 are not read
]
THREE_RANKS = [(kind, SIX, (1, 3, 1), False) for kind in ("fp32", "bf16-dist")] + [
    ("fp32-dist", SIX, (1, 3, 1), True)
]


@pytest.fixture(scope="module")
def loaded(saved, root):
    results = {}
    for world, targets in ((4, FOUR_RANKS), (3, THREE_RANKS)):
        for rank, result in enumerate(run_ranks(_load, world, root, targets)):
            for key, value in result.items():
                results.setdefault(key, {})[rank] = value
    return results


def test_resume_on_the_same_layout_is_exact(saved):
    for result in saved:
        for kind, (
            went_on,
            again,
            same_draws,
            (counts, separate),
            (compared, wrong),
            groups,
        ) in result.items():
            assert went_on == again, kind
            assert same_draws, kind
            assert counts == {float(STEPS)} and separate, kind
            assert compared > 20 and not wrong, (kind, wrong)
            assert all(group["fused"] for group in groups)


@pytest.mark.parametrize("target", FOUR_RANKS + THREE_RANKS, ids=str)
def test_other_layouts_and_maps_are_bit_exact(loaded, target):
    for rank, ((compared, wrong), (counts, separate), _) in loaded[target].items():
        assert compared > 0 and not wrong, (rank, wrong)
        assert counts == {float(STEPS)} and separate


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fp32")])
def test_training_goes_on_alike_on_other_layouts(saved, loaded, kind):
    reference = saved[0][kind][0]
    for (other, spelling, _, homogeneous), by_rank in loaded.items():
        if other == kind and spelling == "identity" and not homogeneous:
            for _, _, losses in by_rank.values():
                for mine, theirs in zip(losses, reference[:2], strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_grown_model_trains_alike_on_every_layout(loaded):
    one = loaded["fp32", SIX, (1, 1, 1), False][0][2]
    for key in (("fp32", SIX, (1, 3, 1), False), ("fp32-dist", SIX, (1, 1, 1), False)):
        for mine, theirs in zip(loaded[key][0][2], one, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
