"""Communication overlapped with computation changes no bit: steps, weights, checkpoints.

Every element of a gradient or a weight is summed or copied over the replicas by itself, and two replicas add
two numbers, so it does not matter how many go in one collective, nor when. The norm of all gradients is a sum
in an order that depends on the buckets: equal to a few units of 2^-24, and clipping by it is left out here
(`test_parallel.py` has it).
"""

from dataclasses import replace

import pytest
import torch

from solar_mega.config.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.ranks import layout
from tests.train.tiny import Case, batches, start

PLAIN = Case(steps=4, micro_batch_size=1, optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0))
REDUCE = dict(overlap_grad_reduce=True)
BOTH = dict(overlap_grad_reduce=True, overlap_param_gather=True)
ALONE = dict(bucket_size=1)
"""Every weight a bucket of its own, on the first stage's first chunk: a weight that is used without waiting
for it, or reduced before its gradient is there, shows."""

CASES = {
    "dp2": (2, PLAIN, [REDUCE | ALONE, BOTH, BOTH | ALONE, BOTH | dict(bucket_size=3000)]),
    "dp2, all have the optimizer": (
        2,
        PLAIN.on(distributed_optimizer=False),
        [REDUCE | ALONE],
    ),
    "dp2, one micro-batch": (2, replace(PLAIN, micro_batch_size=4), [BOTH | ALONE]),
    "dp2, bf16, recompute": (2, replace(PLAIN, precision="bf16", recompute="full"), [BOTH | ALONE]),
    "dp2, tied": (2, replace(PLAIN, tied=True), [BOTH | ALONE]),
    "dp2, qwen3": (2, replace(PLAIN, family="Qwen3"), [BOTH | ALONE]),
    "dp2, frozen": (2, replace(PLAIN, frozen=(0, 2)), [BOTH | ALONE]),
    "dp2, all logits": (
        2,
        replace(PLAIN, kernels=replace(PLAIN.kernels, loss_logits_mib=0)),
        [BOTH | ALONE],
    ),
    "pp2 dp2": (4, PLAIN.on(1, 2), [BOTH | ALONE]),
    "pp2 vpp2 dp2": (4, PLAIN.on(1, 2, vpp=2), [REDUCE, BOTH | ALONE]),
    "tied, pp2 dp2": (4, replace(PLAIN.on(1, 2), tied=True), [BOTH | ALONE]),
    "tp2 sp dp2": (4, PLAIN.on(2, sequence_parallel=True), [BOTH | ALONE]),
}
RUNS = [(name, options) for name, (_, _, overlaps) in CASES.items() for options in overlaps]


def _train_all(cases: list[tuple[str, dict]]) -> list[dict]:
    return [_train(*case) for case in cases]


def _train(name: str, options: dict) -> dict:
    """Losses of the steps and of a validation between them, norms, and this rank's weights at the end."""
    _, case, _ = CASES[name]
    case = replace(case, parallel=replace(case.parallel, **options))
    with layout(**{key: value for key, value in vars(case.parallel).items() if key != "dp"}):
        chunks, trainer = start(case)
        data, micro_batches = batches(case)
        validation, count = batches(case, first_sample=500_000)
        losses, norms = [], []
        for number in range(case.steps):
            result = trainer.step(data, micro_batches)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if number == 1:
                losses.append(trainer.evaluate(validation, count).loss)
        trainer.gather_weights()
        weights = {
            f"{i} {n}": p.detach().clone() for i, c in enumerate(chunks) for n, p in c.named_parameters()
        }
    return dict(losses=losses, norms=norms, weights=weights)


@pytest.fixture(scope="module")
def results() -> dict:
    """(case, options) -> what each rank had; options None without overlap."""
    found = {}
    for ranks in (2, 4):
        names = [name for name, (size, *_) in CASES.items() if size == ranks]
        runs = [(name, {}) for name in names] + [run for run in RUNS if run[0] in names]
        by_rank = run_ranks(_train_all, ranks, runs)
        for number, (name, options) in enumerate(runs):
            found[name, str(options)] = [rank[number] for rank in by_rank]
    return found


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_the_same_bits_with_and_without(results, name, options):
    for with_overlap, without in zip(results[name, str(options)], results[name, "{}"], strict=True):
        assert with_overlap["losses"] == without["losses"]
        assert with_overlap["norms"] == pytest.approx(without["norms"], rel=1e-6)
        for key, weight in without["weights"].items():
            assert torch.equal(with_overlap["weights"][key], weight), key


def test_the_replicas_agree(results):
    first, second = results["dp2", str(BOTH | ALONE)]
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
