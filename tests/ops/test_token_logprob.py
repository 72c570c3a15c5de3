"""Token log-probs' compiled ops against fp64, on every device that has them, whole and split over ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solar_mega import ops
from solar_mega.ops.token_logprob import Fused
from solar_mega.ops.token_logprob_reference import Reference
from tests.ops.devices import DEVICES, DTYPES, NARROWER, run_again_on

SMOOTHED = dict(label_smoothing=0.1, z_loss=1e-3)

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def low_precision_formula(logits, targets, label_smoothing=0.0, z_loss=0.0, **_):
    """What PyTorch code computes in the logits' own dtype."""
    logps = logits.log_softmax(-1)
    out = logps.gather(-1, targets[..., None])[..., 0]
    if label_smoothing:
        out = (1 - label_smoothing) * out + label_smoothing * logps.mean(-1)
    return out - z_loss * logits.logsumexp(-1).square() if z_loss else out


def run(function, logits, targets, dlogps, **options):
    leaf = logits.detach().clone().requires_grad_()
    logps = function(leaf.view_as(leaf), targets, **options)
    (dlogits,) = torch.autograd.grad(logps, leaf, dlogps.to(logps.dtype))
    return logps.detach(), dlogits


def check_against_fp64(logits, targets, dlogps, **options):
    """Both outputs err at most twice as much as the low-precision formula, at worst and on average; where
    that errs little by luck, by one rounding of the largest output and by fp32 noise of the terms that cancel
    in it."""
    exact = run(ops.token_logprob_reference, logits.double(), targets, dlogps, **options)
    rough = run(low_precision_formula, logits, targets, dlogps, **options)
    got = run(ops.token_logprob, logits, targets, dlogps, **options)
    written = run(ops.token_logprob, logits, targets, dlogps, inplace_backward=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, written, strict=True))
    unit = 4 * torch.finfo(torch.float32).eps
    z, largest = options.get("z_loss", 0), logits.double().nan_to_num(neginf=0).abs().max()
    noise = (
        unit * (exact[0].abs().max() + z * largest**2),
        unit * dlogps.abs().max() * (1 + 2 * z * largest),
    )
    for name, value, want, formula, slack in zip(("logps", "dlogits"), got, exact, rough, noise, strict=True):
        error, allowed = (value.double() - want).abs(), (formula.double() - want).abs()
        slack = slack + torch.finfo(value.dtype).eps / 2 * want.abs().max()
        assert value.isfinite().all(), name
        assert error.max() <= 2 * allowed.max() + slack, f"{name}: {error.max():.3g} vs {allowed.max():.3g}"
        assert error.mean() <= 2 * allowed.mean() + slack, name
    assert got[0].dtype == torch.float32


def inputs(shape, dtype, device, seed=0, scale=4.0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=random) * scale
    targets = torch.randint(shape[-1], shape[:-1], generator=random)
    dlogps = torch.randn(shape[:-1], generator=random)
    return logits.to(device, dtype), targets.to(device), dlogps.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 32000), (5, 2), (2, 3, 257), (33, 2047), (9, 4099), (4, 50257)]
)
@pytest.mark.parametrize("options", [{}, SMOOTHED], ids=["plain", "smoothed, z"])
def test_matches_fp64(device, dtype, shape, options):
    check_against_fp64(*inputs(shape, dtype, device), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e6, 1e30], ids=str)
def test_magnitudes(device, dtype, scale):
    check_against_fp64(*inputs((7, 301), dtype, device, scale=scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0], ids=str)
def test_confident_targets(device, dtype, offset):
    """p = 0.999: the gradient at the target is a difference of nearly equal numbers, worse far from 0."""
    logits, targets, dlogps = inputs((16, 1000), torch.float32, device, scale=0.1)
    logits.scatter_(-1, targets[:, None], torch.log(torch.tensor(999.0 * 999.0)).item())
    check_against_fp64((logits + offset).to(dtype), targets, dlogps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0, -250.0])
def test_equal_rows(device, dtype, value):
    logits, targets, dlogps = inputs((5, 4100), dtype, device)
    check_against_fp64(torch.full_like(logits, value), targets, dlogps)
    result = ops.token_logprob_with_metrics(torch.full_like(logits, value), targets)
    torch.testing.assert_close(
        result.logps, torch.full_like(result.logps, -torch.tensor(4100.0).log().item())
    )
    torch.testing.assert_close(result.entropy, -result.logps)
    assert result.hit.all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_minus_infinity_have_no_probability(device, dtype):
    logits, targets, dlogps = inputs((6, 4999), dtype, device)
    forbidden = torch.arange(4999, device=device) % 2 == 1
    logits[:, forbidden] = float("-inf")
    logits[0, :4000] = float("-inf")  # whole blocks and vectors of it, first
    targets = targets // 2 * 2
    targets[0] = 4444
    check_against_fp64(logits, targets, dlogps)
    _, dlogits = run(ops.token_logprob, logits, targets, dlogps)
    assert (dlogits[:, forbidden] == 0).all()
    entropy = ops.token_logprob_with_metrics(logits, targets).entropy
    p = logits.double().softmax(-1)
    torch.testing.assert_close(entropy.double(), -torch.xlogy(p, p).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None], ids=["nan", "inf", "all -inf"])
@pytest.mark.parametrize("column", [0, 2500, 4098])
def test_a_row_without_a_softmax_is_nan_and_stays_alone(device, poison, column):
    logits, targets, dlogps = inputs((3, 4099), torch.float32, device)
    if poison is None:
        logits[1] = float("-inf")
    else:
        logits[1, column] = poison
    logps, dlogits = run(ops.token_logprob, logits, targets, dlogps)
    assert logps[1].isnan() and logps[[0, 2]].isfinite().all()
    assert dlogits[1].isnan().any() and dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_masked_tokens_are_not_read(device, implementation):
    logits, targets, dlogps = inputs((2, 5, 130), torch.float32, device)
    mask = torch.rand(2, 5, device=device) < 0.6
    mask[0, :2] = torch.tensor([True, False])
    targets[0, 0], targets[0, 1] = -100, 5000
    counted = mask & (targets != -100)
    poisoned = logits.masked_fill(~counted[..., None], float("nan"))
    options = dict(mask=mask, implementation=implementation, **SMOOTHED)
    logps, dlogits = run(ops.token_logprob, poisoned, targets, dlogps, **options)
    want = run(ops.token_logprob_reference, logits, targets.where(counted, 0), dlogps, **SMOOTHED)
    for got, wanted in zip((logps, dlogits), want, strict=True):
        assert (got[~counted] == 0).all()
        torch.testing.assert_close(got[counted], wanted[counted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2049, 4999, 5000])
def test_padding_of_the_vocabulary(device, dtype, size):
    logits, targets, dlogps = inputs((6, 5000), dtype, device)
    targets = targets % size
    logits[:, size:] = float("nan")
    padded = run(ops.token_logprob, logits, targets, dlogps, vocab_size=size, **SMOOTHED)
    whole = run(ops.token_logprob, logits[:, :size], targets, dlogps, **SMOOTHED)
    assert torch.equal(padded[0], whole[0]) and torch.equal(padded[1][:, :size], whole[1])
    assert (padded[1][:, size:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_metrics(device):
    logits, targets, _ = inputs((64, 700), torch.bfloat16, device, scale=1.0)
    targets[::2] = logits[::2].argmax(-1)
    result = ops.token_logprob_with_metrics(logits, targets)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(result.entropy.double(), -torch.xlogy(p, p).sum(-1), rtol=1e-5, atol=1e-5)
    best = logits.amax(-1) == logits.gather(-1, targets[:, None])[:, 0]
    assert torch.equal(result.hit, best) and result.hit[::2].all() and not result.hit.all()
    assert torch.equal(result.logps, ops.token_logprob(logits, targets))
    again = ops.token_logprob_with_metrics(logits, targets, implementation="reference")
    for got, want in zip(result, again, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_views(device):
    torch.manual_seed(0)
    base = torch.randn(3, 8, 129, device=device)
    views = {
        "transposed [b, s, V]": base.transpose(0, 1),
        "half of each row": torch.randn(3, 8, 258, device=device)[..., :129],
        "every other row": torch.randn(6, 8, 129, device=device)[::2],
        "misaligned start": torch.randn(3 * 8 * 129 + 1, device=device)[1:].view(3, 8, 129),
    }
    for name, logits in views.items():
        targets = torch.randint(129, logits.shape[:-1], device=device)
        dlogps = torch.randn(logits.shape[:-1], device=device)
        want = run(ops.token_logprob, logits.contiguous(), targets, dlogps)
        strided = logits.detach().requires_grad_()
        for inplace in (False, True):
            logps = ops.token_logprob(strided.view_as(strided), targets, inplace_backward=inplace)
            (dlogits,) = torch.autograd.grad(logps, strided, dlogps)
            torch.testing.assert_close(logps.detach(), want[0], rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(dlogits, want[1], rtol=1e-6, atol=1e-7, msg=name)
    one_row = torch.randn(129, device=device, requires_grad=True).expand(4, 129)
    targets = torch.tensor([1, 2, 3, 128], device=device)
    assert ops.token_logprob(one_row, targets).shape == (4,)
    with pytest.raises(RuntimeError, match="rows of logits share memory"):
        ops.token_logprob(one_row, targets, inplace_backward=True).sum().backward()


def test_offsets_beyond_two_billion_elements():
    """Rows 2^30 elements apart in memory that is never touched otherwise, so the pages between do not
    exist."""
    step = 2**30
    memory = torch.empty(3 * step + 64, dtype=torch.bfloat16)
    logits = memory.as_strided((4, 50), (step, 1))
    values, targets, dlogps = inputs((4, 50), torch.bfloat16, "cpu")
    logits.copy_(values)
    want = run(ops.token_logprob, values, targets, dlogps)
    saved = torch.ops.solar_mega.token_logprob(logits, targets, None, 50)
    assert torch.equal(saved[0], want[0])
    torch.ops.solar_mega.token_logprob_backward_(dlogps, logits, targets, saved[1], 0, 50)
    assert torch.equal(logits, want[1])


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    logits = torch.randn(0, 3, 16, device=device, requires_grad=True)
    targets = torch.zeros(0, 3, dtype=torch.int64, device=device)
    for inplace in (False, True):
        logps = ops.token_logprob(logits.view_as(logits), targets, inplace_backward=inplace)
        logps.sum().backward()
        assert logps.shape == (0, 3) and logits.grad.shape == logits.shape


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from([{}, SMOOTHED]),
)
def test_any_shape(rows, width, dtype, options):
    check_against_fp64(*inputs((rows, width), dtype, "cpu", seed=rows * 10_000 + width), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_to_the_bit(device, dtype):
    tensors = inputs((70, 3001), dtype, device)
    first, second = (run(ops.token_logprob, *tensors, **SMOOTHED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_number_of_threads_does_not_change_a_bit():
    tensors = inputs((37, 20_000), torch.float32, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(ops.token_logprob, *tensors, **SMOOTHED))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_passes_gradcheck():
    logits, targets, _ = inputs((2, 3, 7), torch.float64, "cpu")
    mask = torch.tensor([[True, False, True], [True, True, True]])
    logits.requires_grad_()
    for options in ({}, SMOOTHED, dict(mask=mask, vocab_size=7)):
        assert torch.autograd.gradcheck(
            lambda x, o=options: ops.token_logprob_reference(x, targets, **o), (logits,)
        )


@pytest.mark.parametrize("options", [{}, SMOOTHED], ids=["plain", "smoothed, z"])
def test_the_twin_in_pytorch_computes_what_the_ops_do(options):
    """Its fp64 arithmetic against autograd through the formula; its statistics against the ops'."""
    logits, targets, dlogps = inputs((5, 90), torch.float64, "cpu")
    got = run(ops.token_logprob, logits, targets, dlogps.double(), implementation="reference", **options)
    want = run(ops.token_logprob_reference, logits, targets, dlogps.double(), **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for first in (0, 45, 90):
        arguments = (logits.float()[:, :45], targets, None, first, 80, True, True)
        torch.testing.assert_close(Fused.partial(*arguments), Reference.partial(*arguments))


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_instruction_sets(isa):
    """Again, in a process that may use no wider vectors than `isa`."""
    run_again_on(isa, __file__, "test_any_shape or minus_infinity or without_a_softmax or magnitudes")
