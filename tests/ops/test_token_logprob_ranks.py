"""Token log-probs with the vocabulary split over real ranks agree with one rank holding all of it."""

import pytest
import torch

from solar_mega import ops
from tests.distributed import run_ranks

SMOOTHED = dict(label_smoothing=0.1, z_loss=1e-3)

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())

CASES = {
    "fp32": (torch.float32, dict()),
    "bf16": (torch.bfloat16, SMOOTHED),
    "padded": (torch.float32, dict(vocab_size=300, **SMOOTHED)),  # of 1200: with tp 4 three ranks have none
    "reference": (torch.float32, dict(implementation="reference", **SMOOTHED)),
}


def _split_over_ranks():
    """Each case's (logps, entropy, hit, dlogits of this rank's columns), and the messages for bad targets."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, (dtype, options) in CASES.items():
        logits, targets, dlogps = _case(dtype, options)
        mine = logits.chunk(ranks, -1)[rank].clone().requires_grad_()
        result = ops.token_logprob_with_metrics(
            mine.view_as(mine), targets, tp_group=dist.group.WORLD, inplace_backward=True, **options
        )
        (dlogits,) = torch.autograd.grad(result.logps, mine, dlogps)
        results[name] = (*(t.detach() for t in result), dlogits)
    try:
        ops.token_logprob(mine, targets + 1200, tp_group=dist.group.WORLD)
    except RuntimeError as error:
        results["error"] = str(error)
    dist.destroy_process_group()
    return results


def _case(dtype, options):
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 11, 1200, generator=random) * 4).to(dtype)
    targets = torch.randint(options.get("vocab_size", 1200), (3, 11), generator=random)
    dlogps = torch.randn(3, 11, generator=random)
    targets[0, 3] = -100
    return logits, targets, dlogps


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one(ranks):
    by_rank = run_ranks(_split_over_ranks, ranks)
    for name, (dtype, options) in CASES.items():
        logits, targets, dlogps = _case(dtype, options)
        leaf = logits.clone().requires_grad_()
        want = ops.token_logprob_with_metrics(leaf, targets, **options)
        (dlogits,) = torch.autograd.grad(want.logps, leaf, dlogps)
        for other in by_rank[1:]:  # to the bit: ranks must not drift apart
            assert all(torch.equal(a, b) for a, b in zip(by_rank[0][name][:3], other[name][:3], strict=True))
        logps, entropy, hit, _ = by_rank[0][name]
        torch.testing.assert_close(logps, want.logps.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy, want.entropy, rtol=1e-6, atol=2e-6)
        assert torch.equal(hit, want.hit)
        got = torch.cat([result[name][3] for result in by_rank], -1)
        # An fp32 result may fall on the other side of a bf16 rounding boundary.
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got, dlogits, rtol=rtol, atol=1e-6)
    assert all("allowed: 0 to 1199" in result["error"] for result in by_rank)
