"""The same twenty steps on every layout: losses and gradient norms agree at each step.

Tolerance. All layouts compute the same sums in another order, so in fp32 a step's loss and gradient norm
differ by a few units of 2^-24 = 6e-8, relative (seen: 2e-7). Adam divides each gradient by its own size, so
where a gradient is close to rounding noise its update carries that noise at full learning rate; with
lr = 1e-3 and 20 steps the weights of two layouts drift apart by up to 1e-6 of their size. 3e-6 leaves room
for that and is far below what a wrong split does (a lost micro-batch, a doubled gradient: above 1e-3).
"""

from dataclasses import replace

import pytest

from tests.distributed import run_ranks
from tests.ranks import layout
from tests.train.tiny import Case, one_rank, train

TOLERANCE = 3e-6
PLAIN = Case()
SP = dict(sequence_parallel=True)
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000)
PLAIN_OPTIMIZER = dict(distributed_optimizer=False)

ONE_RANK = {
    "tp1": PLAIN,
    "tp1, micro-batches of 1": replace(PLAIN, micro_batch_size=1),
    "tp1, one micro-batch": replace(PLAIN, micro_batch_size=8),
    "tp1, recompute full": replace(PLAIN, recompute="full"),
    "tp1, recompute selective": replace(PLAIN, recompute="selective"),
    "tp1, without distributed optimizer": PLAIN.on(**PLAIN_OPTIMIZER),
    "tied": replace(PLAIN, tied=True),
    "bf16": replace(PLAIN, precision="bf16"),
    "qwen2": replace(PLAIN, family="Qwen2"),
    "qwen3": replace(PLAIN, family="Qwen3"),
}
TWO_RANKS = {
    "tp2": PLAIN.on(2),
    "pp2": PLAIN.on(1, 2),
    "pp2 vpp2": PLAIN.on(1, 2, vpp=2),
    "tp2 sp": PLAIN.on(2, **SP),
    "dp2": PLAIN.on(),
    "dp2, without distributed optimizer": PLAIN.on(**PLAIN_OPTIMIZER),
    "dp2, overlapped": PLAIN.on(**OVERLAP),
    "tp2, recompute full": replace(PLAIN.on(2, **SP), recompute="full"),
    "pp2, recompute selective": replace(PLAIN.on(1, 2), recompute="selective"),
    "tied, tp2": replace(PLAIN.on(2), tied=True),
    "tied, pp2": replace(PLAIN.on(1, 2), tied=True),
    "tied, pp2 vpp2": replace(PLAIN.on(1, 2, vpp=2), tied=True),
    "bf16, tp2": replace(PLAIN.on(2), precision="bf16"),
    "bf16, pp2": replace(PLAIN.on(1, 2), precision="bf16"),
    # Biases are split with their heads; the norms of queries and keys are whole on ranks with other heads.
    "qwen2, tp2": replace(PLAIN.on(2), family="Qwen2"),
    "qwen2, tp2 sp": replace(PLAIN.on(2, **SP), family="Qwen2"),
    "qwen3, tp2": replace(PLAIN.on(2), family="Qwen3"),
    "qwen3, tp2 sp": replace(PLAIN.on(2, **SP), family="Qwen3"),
}
FOUR_RANKS = {
    "tp2 pp2": PLAIN.on(2, 2),
    "tp2 pp2 vpp2 sp": PLAIN.on(2, 2, vpp=2, **SP),
    "tp2 dp2 sp": PLAIN.on(2, **SP),
    "tied, tp2 pp2": replace(PLAIN.on(2, 2), tied=True),
    "tied, pp2 dp2": replace(PLAIN.on(1, 2), tied=True),
}


def _train_here(cases):
    results = {}
    for name, case in cases.items():
        with one_rank(case.parallel):
            results[name] = train(case)
    return results


def _train_all(cases):
    results = {}
    for name, case in cases.items():
        options = {key: value for key, value in vars(case.parallel).items() if key != "dp"}
        with layout(**options):
            results[name] = train(case)
    return results


@pytest.fixture(scope="module")
def results():
    merged = _train_here(ONE_RANK)
    for ranks, cases in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        by_rank = run_ranks(_train_all, ranks, cases)
        assert all(result == by_rank[0] for result in by_rank)  # every rank knows the same loss and norm
        merged.update(by_rank[0])
    return merged


def _reference(name: str) -> str:
    return next((word for word in ("tied", "bf16", "qwen2", "qwen3") if name.startswith(word)), "tp1")


def _deviations(result, reference):
    """Largest relative difference of (loss, gradient norm, validation loss)."""
    pairs = zip(result["steps"], reference["steps"], strict=True)
    losses, norms = zip(
        *[[abs(a - b) / abs(b) for a, b in zip(x, y, strict=True)] for x, y in pairs], strict=True
    )
    valid = zip(result["validation"], reference["validation"], strict=True)
    return max(losses), max(norms), max(abs(a - b) / b for a, b in valid)


@pytest.mark.parametrize(
    "name",
    [n for n in (*ONE_RANK, *TWO_RANKS, *FOUR_RANKS) if not n.startswith("bf16") and n != _reference(n)],
)
def test_every_layout_takes_the_same_steps(results, name):
    assert max(_deviations(results[name], results[_reference(name)])) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("tp1, recompute full", "tp1"),
        ("tp1, recompute selective", "tp1"),
        ("tp2, recompute full", "tp2 sp"),
        ("pp2, recompute selective", "pp2"),
    ],
)
def test_recomputing_activations_changes_no_bit(results, name, reference):
    assert results[name] == results[reference]


@pytest.mark.parametrize("name", [n for n in TWO_RANKS if n.startswith("bf16")])
def test_bf16_layouts_agree_within_its_rounding(results, name):
    """bf16 rounds with u = 2^-9 to 2^-8, relative. A layout with other partial sums perturbs each token's
    loss by u times the size of a logit (about 1) for each of some 10 rounded additions into the residual
    stream: 3 u, at random, so a mean over the hundred tokens of a batch moves by 3 u / 10 = 1.2e-3; four of
    these is 5e-3, of a loss of 3 to 5: 1e-3, relative. Gradients, rounded as often, have a norm good to
    4 u = 1.6e-2."""
    loss, norm, validation = _deviations(results[name], results["bf16"])
    assert loss < 1e-3 and validation < 1e-3
    assert norm < 1.6e-2


def test_bf16_learns_what_fp32_learns(results):
    """Not more than twice the bound between bf16 layouts: fp32 is one more way of rounding."""
    loss, norm, validation = _deviations(results["bf16"], results["tp1"])
    assert 0 < loss < 2e-3 and validation < 2e-3
    assert norm < 3.2e-2


def test_the_steps_are_worth_comparing(results):
    for name in ("tp1", "tied", "bf16"):
        (before, after), steps = results[name]["validation"], results[name]["steps"]
        assert after < before - 0.05  # it learns
        assert any(norm > PLAIN.optimizer.clip_grad for _, norm in steps)  # and is clipped now and then
    assert results["tp1"]["steps"] != results["tied"]["steps"]
