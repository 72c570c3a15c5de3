"""Frozen layers do not move, and the others train as they would beside constants, on every layout."""

from dataclasses import replace

import pytest
import torch

from tests.distributed import run_ranks
from tests.ranks import layout
from tests.train.tiny import Case, batches, one_rank, start

TOLERANCE = 3e-6  # as in test_parallel.py
STEPS = 4
SOME, FIRST_HALF = (1, 3), (0, 1)  # the second is a whole stage of PP2
CASE = replace(Case(), steps=STEPS, frozen=SOME)
LAYOUTS = {
    "tp2 sp": CASE.on(2, sequence_parallel=True),
    "pp2": CASE.on(1, 2),
    "pp2, a stage without layers to train": replace(CASE.on(1, 2), frozen=FIRST_HALF),
    "pp2 vpp2, recompute": replace(CASE.on(1, 2, vpp=2), recompute="full"),
    "dp2": CASE.on(),
    "dp2, without distributed optimizer": CASE.on(distributed_optimizer=False),
    "bf16, dp2": replace(CASE.on(), precision="bf16"),
}


def _run(case):
    """(steps, layers of this rank that moved, layers that did not, their gradients' places)."""
    chunks, trainer = start(case)
    layers = {layer.layer_number - 1: layer for chunk in chunks for layer in chunk.decoder.layers}
    before = {n: [p.detach().clone() for p in layer.parameters()] for n, layer in layers.items()}
    data, micro_batches = batches(case)
    results = [trainer.step(data, micro_batches) for _ in range(case.steps)]
    still = {n for n, layer in layers.items() if _same(before[n], layer)}
    assert not any(hasattr(p, "main_grad") for n in still for p in layers[n].parameters())
    return [(r.loss, r.grad_norm) for r in results], set(layers) - still, still


def _same(before, layer):
    return all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def _all(cases):
    results = {}
    for name, case in cases.items():
        options = {key: value for key, value in vars(case.parallel).items() if key != "dp"}
        with layout(**options):
            results[name] = _run(case)
    return results


@pytest.fixture(scope="module")
def alone():
    results = {}
    for frozen, precision in ((SOME, "fp32"), (FIRST_HALF, "fp32"), (SOME, "bf16"), ((), "fp32")):
        case = replace(CASE, frozen=frozen, precision=precision)
        with one_rank(case.parallel):
            results[frozen, precision] = _run(case)
    return results


def test_frozen_layers_stay_and_others_move(alone):
    for (frozen, _), (_, moved, still) in alone.items():
        assert still == set(frozen) and moved == {0, 1, 2, 3} - set(frozen)


def test_the_first_loss_is_that_of_the_whole_model_and_the_gradient_is_smaller(alone):
    whole, part = alone[(), "fp32"][0], alone[SOME, "fp32"][0]
    assert part[0][0] == whole[0][0]
    assert 0 < part[0][1] < whole[0][1]


def test_every_layout_does_the_same(alone):
    for rank in run_ranks(_all, 2, LAYOUTS):
        for name, (steps, moved, still) in rank.items():
            case = LAYOUTS[name]
            assert still <= set(case.frozen) and not moved & set(case.frozen), name
            reference = alone[case.frozen, case.precision][0]
            tolerance = TOLERANCE if case.precision == "fp32" else 2e-2
            for mine, theirs in zip(steps, reference, strict=True):
                assert mine == pytest.approx(theirs, rel=tolerance), name


def test_a_run_with_frozen_layers_resumes_exactly(tmp_path):
    from solar_mega.checkpoint.megatron import load_checkpoint, save_checkpoint
    from solar_mega.checkpoint.run_state import RunState
    from solar_mega.checkpoint.store import CheckpointStore
    from tests.train.tiny import architecture

    with one_rank(CASE.parallel):
        chunks, trainer = start(CASE)
        data, micro_batches = batches(CASE)
        for _ in range(2):
            trainer.step(data, micro_batches)
        state = RunState(
            step=2,
            consumed_samples=16,
            consumed_tokens=16 * 24,
            schedule=trainer.schedule.state_dict(),
            hf_config=dict(architecture().hf_config),
            config_toml="",
            parallel={},
            source="",
            lineage={},
        )
        path = save_checkpoint(CheckpointStore(tmp_path), chunks, trainer.optimizer, state)
        went_on = trainer.step(data, micro_batches)
        again, other = start(CASE)
        state = load_checkpoint(path, again, other.optimizer)
        other.schedule.load_state_dict(state.schedule)
        data, _ = batches(CASE, first_sample=16)
        resumed = other.step(data, micro_batches)
        assert (resumed.loss, resumed.grad_norm) == (went_on.loss, went_on.grad_norm)
        for a, b in zip(chunks[0].parameters(), again[0].parameters(), strict=True):
            assert torch.equal(a, b)
