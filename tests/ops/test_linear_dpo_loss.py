"""A preference loss from hidden states: both ways to its gradient, with every variant, in pieces and over
ranks, against all logits at once in fp64."""

import pytest
import torch

from solar_mega import ops
from solar_mega.ops.dpo_loss import VARIANTS
from solar_mega.ops.linear_dpo_loss import dpo_token_weights
from tests.distributed import run_ranks
from tests.ops.multiplications import Multiplications

ENDS = [0, 9, 21, 21, 40, 44, 61, 80, 97]  # four pairs, one with an empty chosen response
TOKENS, HIDDEN, VOCAB = 100, 32, 640
ONE_PAIR = 40 * VOCAB * 4


def inputs(dtype=torch.float32):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=random).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN, generator=random) * 0.3).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    mask = torch.rand(TOKENS, generator=random) < 0.7
    mask[61:80] = False  # a chosen response of which nothing counts
    reference = -40 * torch.rand(len(ENDS) - 1, generator=random, dtype=torch.float64)
    return x, weight, targets, mask, reference


def run(function, x, weight, *rest, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    result = function(*leaves, *rest, **options)
    return result, torch.autograd.grad(result.loss, leaves)


def exact(x, weight, targets, ends, *, mask, reference_logps, **options):
    logps = ops.linear_token_logprob_reference(x, weight, targets, mask=mask)
    offsets = torch.tensor(ends, dtype=torch.int32)
    return ops.dpo_loss_reference(logps, offsets, mask, reference_logps, **options)


OPTIONS = {name: dict(variant=name) for name in VARIANTS} | {
    "smoothed": dict(label_smoothing=0.2),
    "rpo, tokens": dict(rpo_alpha=0.5),
    "rpo, sequences": dict(rpo_alpha=0.5, rpo_mean="sequences"),
}


@pytest.mark.parametrize("limit", [1, ONE_PAIR, 10**9], ids=["recomputed", "pieces", "one piece"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_all_logits_at_once(name, limit):
    x, weight, targets, mask, reference = inputs()
    options = dict(mask=mask, reference_logps=reference, beta=0.3, **OPTIONS[name])
    wanted, gradients = run(exact, x.double(), weight.double(), targets, ENDS, **options)
    got, ours = run(ops.linear_dpo_loss, x, weight, targets, ENDS, max_logits_bytes=limit, **options)
    for field in ("loss", "chosen_rewards", "rejected_rewards", "margins", "accuracies", "sums"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(wanted, field), rtol=2e-5, atol=2e-5)
    for a, b in zip(ours, gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_long_pairs_are_recomputed_and_short_ones_are_not():
    """By the number of multiplications, seen as they are made."""
    x, weight, targets, mask, reference = inputs()
    counted = int(mask.sum())

    def products(limit):
        with Multiplications() as multiplications:
            options = dict(mask=mask, reference_logps=reference, max_logits_bytes=limit)
            run(ops.linear_dpo_loss, x, weight, targets, ENDS, **options)
        return multiplications.total / (counted * HIDDEN * VOCAB)

    assert products(ONE_PAIR) == products(10**9) == 3
    assert products(1) == 4


def test_weights_of_a_mean_over_all_tokens_are_not_known_pair_by_pair():
    assert dpo_token_weights(ENDS, TOKENS, rpo_alpha=0.1) is None
    assert dpo_token_weights(ENDS, TOKENS, rpo_alpha=0.1, rpo_mean="sequences").cuts == [
        0,
        21,
        40,
        61,
        97,
        100,
    ]


def _split_over_ranks():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, weight, targets, mask, reference = inputs()
    results = {}
    for parallel in (False, True):
        mine = x.chunk(ranks)[rank] if parallel else x
        for limit in (1, ONE_PAIR):
            result, gradients = run(
                ops.linear_dpo_loss,
                mine,
                weight.chunk(ranks)[rank],
                targets,
                ENDS,
                mask=mask,
                reference_logps=reference,
                tp_group=dist.group.WORLD,
                sequence_parallel=parallel,
                max_logits_bytes=limit,
            )
            results[parallel, limit] = (result.loss.detach(), *gradients)
    dist.destroy_process_group()
    return results


def test_ranks_agree_with_one():
    by_rank = run_ranks(_split_over_ranks, 2)
    x, weight, targets, mask, reference = inputs()
    for parallel, limit in by_rank[0]:
        options = dict(mask=mask, reference_logps=reference, max_logits_bytes=limit)
        wanted, (dx, dweight) = run(ops.linear_dpo_loss, x, weight, targets, ENDS, **options)
        losses, hidden, head = zip(*(result[parallel, limit] for result in by_rank), strict=True)
        got = torch.cat(hidden) if parallel else hidden[0]
        torch.testing.assert_close(losses[0], wanted.loss.detach())
        torch.testing.assert_close(got, dx, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(torch.cat(head), dweight, rtol=1e-4, atol=1e-7)


def test_bad_cuts_are_refused():
    x, weight, targets, _, _ = inputs()
    with pytest.raises(RuntimeError, match="token_weights.cuts is .*must rise from 0 to 100"):
        ops.linear_token_logprob(x, weight, targets, token_weights=ops.WeightsOf(lambda a, b: a, [0, 50]))
