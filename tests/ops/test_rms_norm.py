"""RMSNorm's compiled ops against fp64, on every device that has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from solar_mega import ops
from tests.ops.devices import DEVICES, DTYPES, NARROWER, run_again_on

EPS = 1e-5

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def low_precision_formula(x, weight, zero_centered):
    """What PyTorch code in the tensors' own dtype computes: every step rounded."""
    gain = weight + 1 if zero_centered else weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain


def run(function, x, residual, weight, dy, dresidual, zero_centered):
    """Outputs and gradients of y·dy + new_residual·dresidual, in the dtype of the inputs given."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    residual = residual.detach().requires_grad_()
    y, total = function(x, residual, weight, zero_centered)
    gradients = torch.autograd.grad([y, total], [x, residual, weight], [dy, dresidual])
    return dict(zip(("y", "sum", "dx", "dresidual", "dweight"), (y, total, *gradients), strict=True))


def fused(x, residual, weight, zero_centered):
    return ops.add_rms_norm(x, residual, weight, EPS, zero_centered=zero_centered)


def formula(x, residual, weight, zero_centered):
    total = x + residual
    return low_precision_formula(total, weight, zero_centered), total


def reference(x, residual, weight, zero_centered):
    return ops.add_rms_norm_reference(x, residual, weight, EPS, zero_centered)


def fp32_noise(total, weight, dy, dresidual, zero_centered):
    """Rounding of fp32 sums: a few units in the last place of the terms summed, however they cancel."""
    x, u, d = total.double(), dy.double() * (weight.double() + zero_centered), dresidual.double().abs()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    row = (x * u).abs().mean(-1, keepdim=True) * rstd**3 * x.abs()
    dx = ((u * rstd).abs() + row + d).max()
    dweight = (dy.double() * x * rstd).abs().flatten(0, -2).sum(0).max()
    unit = 4 * torch.finfo(torch.float32).eps
    return {"y": 0.0, "dx": unit * dx, "dresidual": unit * dx, "dweight": unit * dweight}


def check_against_fp64(x, residual, weight, dy, dresidual, zero_centered=False):
    """Every output errs at most twice as much as the low-precision formula, at worst and on average.

    The formula's own error may be small by luck, so one rounding of the largest output is always allowed, and
    the noise of fp32 sums.
    """
    inputs = (x, residual, weight, dy, dresidual)
    got = run(fused, *inputs, zero_centered)
    rough = run(formula, *inputs, zero_centered)
    assert torch.equal(got["sum"], x + residual)
    # The norm is of the rounded sum in all three, so the exact computation starts from there.
    rest = (t.double() for t in (torch.zeros_like(x), weight, dy, dresidual))
    exact = run(reference, got["sum"].double(), *rest, zero_centered)
    noise = fp32_noise(got["sum"].detach(), weight, dy, dresidual, zero_centered)
    for name, slack in noise.items():
        want = exact[name]
        error, allowed = (got[name].double() - want).abs(), (rough[name].double() - want).abs()
        slack += torch.finfo(x.dtype).eps / 2 * want.abs().max()
        assert got[name].isfinite().all(), name
        assert error.max() <= 2 * allowed.max() + slack, (
            f"{name}: {error.max():.3g} against {allowed.max():.3g}"
        )
        assert error.mean() <= 2 * allowed.mean() + slack, name


def inputs(shape, dtype, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=random) for s in (shape, shape, shape[-1:], shape, shape)]
    return [t.to(device, dtype) for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (3, 7), (1, 64), (6, 2, 96), (17, 257), (2, 3, 1026), (33, 4096)]
)
@pytest.mark.parametrize("zero_centered", [False, True], ids=["gain", "zero_centred_gain"])
def test_matches_fp64(device, dtype, shape, zero_centered):
    check_against_fp64(*inputs(shape, dtype, device), zero_centered)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [8192, 16384, 16392, 20001])
def test_wide_rows(device, width):
    check_against_fp64(*inputs((3, width), torch.bfloat16, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e15], ids=str)
def test_magnitudes(device, dtype, scale):
    x, residual, *rest = inputs((9, 320), dtype, device)
    check_against_fp64(x * scale, residual * scale, *rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_large_element_among_small_ones(device, dtype):
    x, residual, *rest = inputs((4, 512), dtype, device)
    x = x * 1e-3
    x[:, 77] = 200.0
    check_against_fp64(x, torch.zeros_like(residual), *rest)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_and_equal_rows(device):
    x, residual, *rest = inputs((6, 128), torch.float32, device)
    x, residual = torch.zeros_like(x), torch.zeros_like(residual)
    x[3:] = 2.5
    check_against_fp64(x, residual, *rest)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device):
    x, _, weight, *_ = inputs((4, 96), torch.bfloat16, device)
    x[2, 5] = float("nan")
    y = ops.rms_norm(x, weight, EPS)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_add_then_rms_norm_to_the_bit(device, dtype):
    x, residual, weight, *_ = inputs((7, 3, 200), dtype, device)
    y, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(x + residual, weight, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", ["y", "residual", "both"])
def test_gradient_when_only_one_output_is_used(device, used):
    x, residual, weight, dy, dresidual = inputs((5, 72), torch.float32, device)

    def gradients(implementation):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
        y, total = ops.add_rms_norm(*leaves, EPS, implementation=implementation)
        loss = (y * dy).sum() * (used != "residual") if used != "residual" else 0
        loss = loss + (total * dresidual).sum() if used != "y" else loss
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    for got, want in zip(gradients("fused"), gradients("reference"), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_views(device):
    torch.manual_seed(0)
    base = torch.randn(3, 8, 64, device=device)
    weight = torch.randn(64, device=device)
    views = {
        "transposed [b, s, h]": base.transpose(0, 1),
        "half of each row": torch.randn(3, 8, 128, device=device)[..., :64],
        "every other row": torch.randn(6, 8, 64, device=device)[::2],
        "misaligned start": torch.randn(3 * 8 * 64 + 1, device=device)[1:].view(3, 8, 64),
        "one row repeated": torch.randn(64, device=device).expand(3, 8, 64),
    }
    for name, x in views.items():
        for other in (x, torch.randn_like(x).contiguous()):
            y, total = ops.add_rms_norm(x, other, weight, EPS)
            want, want_total = ops.add_rms_norm(x.contiguous(), other.contiguous(), weight, EPS)
            torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6, msg=name)
            assert torch.equal(total, want_total), name


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_odd_strides(device):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 2, 32, device=device)
    weight = torch.randn(32, device=device)
    for reshape in (lambda y: y.sum(), lambda y: y.permute(3, 1, 0, 2).contiguous().sin().sum()):
        gradients = []
        for implementation in ("fused", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            reshape(ops.rms_norm(*leaves, EPS, implementation=implementation)).backward()
            gradients.append([t.grad for t in leaves])
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    x = torch.randn(0, 3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    y = ops.rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    zero_centered=st.booleans(),
)
def test_any_shape(rows, width, dtype, zero_centered):
    check_against_fp64(*inputs((rows, width), dtype, "cpu", seed=rows * 1000 + width), zero_centered)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_to_the_bit(device, dtype):
    tensors = inputs((515, 384), dtype, device)
    first, second = (run(fused, *tensors, False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_number_of_threads_does_not_change_a_bit():
    tensors = inputs((700, 640), torch.float32, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(fused, *tensors, False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_reference_passes_gradcheck():
    x, residual, weight, *_ = (t.requires_grad_() for t in inputs((3, 7), torch.float64, "cpu"))
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm_reference(*a, EPS), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda *a: ops.rms_norm_reference(*a, EPS, True), (x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    x, residual, weight, dy, dresidual = inputs((4, 3, 48), dtype, device)
    library = torch.ops.solar_mega
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    opcheck(library.rms_norm.default, (leaves[0], leaves[2], EPS))
    opcheck(library.rms_norm.default, (leaves[0].transpose(0, 1), leaves[2], EPS, True))
    opcheck(library.add_rms_norm.default, (*leaves, EPS))
    rstd = library.rms_norm(x, weight, EPS)[1]
    opcheck(library.rms_norm_backward.default, (dy, x, weight, rstd))
    opcheck(library.rms_norm_backward.default, (dy, x, weight, rstd, dresidual, True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_and_the_public_function_have_the_same_gradient(device):
    x, residual, weight, dy, dresidual = inputs((6, 40), torch.float32, device)
    public = run(fused, x, residual, weight, dy, dresidual, False)
    raw = run(
        lambda x, r, w, z: torch.ops.solar_mega.add_rms_norm(x, r, w, EPS, z)[:2],
        *(x, residual, weight, dy, dresidual, False),
    )
    assert all(torch.equal(public[name], raw[name]) for name in public)


def test_compiles_into_one_graph():
    x, residual, weight, *_ = inputs((6, 40), torch.float32, "cpu")

    def block(x, residual, weight):
        y, total = ops.add_rms_norm(x, residual, weight, EPS)
        return ops.rms_norm(y.sin() + total, weight, EPS)

    leaves = [[t.clone().requires_grad_() for t in (x, residual, weight)] for _ in range(2)]
    block(*leaves[0]).square().sum().backward()
    torch.compile(block, backend="aot_eager", fullgraph=True)(*leaves[1]).square().sum().backward()
    for got, want in zip(leaves[1], leaves[0], strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_recomputation_gives_the_same_gradient():
    x, residual, weight, dy, dresidual = inputs((6, 40), torch.float32, "cpu")

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(fused, *args, use_reentrant=False)

    kept = run(fused, x, residual, weight, dy, dresidual, False)
    again = run(recomputed, x, residual, weight, dy, dresidual, False)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_second_derivative_is_refused():
    x, _, weight, *_ = inputs((2, 8), torch.float32, "cpu")
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


GOOD = torch.zeros(2, 3, 8)
WEIGHT = torch.zeros(8)
BAD = {
    "dtype of x": (
        (GOOD.double(), WEIGHT.double()),
        "x has dtype Double; allowed: Float, BFloat16, Half",
    ),
    "dtype of weight": ((GOOD, WEIGHT.bfloat16()), "weight has dtype BFloat16; it must be Float, as x"),
    "shape of weight": ((GOOD, WEIGHT[:7]), r"weight has shape \[7\].*it must be contiguous of shape \[8\]"),
    "stride of weight": ((GOOD, torch.zeros(16)[::2]), r"weight has shape \[8\] and strides \[2\]"),
    "scalar x": ((torch.tensor(1.0), WEIGHT), r"x has shape \[\]; allowed: \[..., hidden\]"),
    "no columns": ((torch.zeros(3, 0), torch.zeros(0)), r"x has shape \[3, 0\]; allowed: .* hidden >= 1"),
    "last stride": (
        (torch.zeros(2, 8, 3).transpose(1, 2), WEIGHT),
        r"x .* has strides \[24, 1, 3\]; allowed:",
    ),
    "three strides": ((torch.zeros(4, 6, 10, 8)[::2, ::3, ::2], WEIGHT), r"x .* Call \.contiguous\(\) on it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    (x, weight), message = BAD[name]
    with pytest.raises(RuntimeError, match=f"^rms_norm: {message}"):
        ops.rms_norm(x, weight, EPS)


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_bad_eps_is_refused(eps):
    with pytest.raises(RuntimeError, match="eps is .*; allowed: a finite number >= 0"):
        ops.rms_norm(GOOD, WEIGHT, eps)


def test_bad_residual_and_backward_arguments_are_refused():
    with pytest.raises(
        RuntimeError, match=r"^add_rms_norm: residual has shape \[1, 3, 8\]; it must be \[2, 3, 8\]"
    ):
        ops.add_rms_norm(GOOD, GOOD[:1], WEIGHT, EPS)
    with pytest.raises(RuntimeError, match="residual has dtype BFloat16; it must be Float"):
        ops.add_rms_norm(GOOD, GOOD.bfloat16(), WEIGHT, EPS)
    backward = torch.ops.solar_mega.rms_norm_backward
    rstd = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"dy has shape \[2, 3, 4\]"):
        backward(GOOD[..., :4], GOOD, WEIGHT, rstd)
    with pytest.raises(RuntimeError, match=r"rstd has shape \[3\].*one value per row of x"):
        backward(GOOD, GOOD, WEIGHT, rstd[0])
    with pytest.raises(RuntimeError, match="rstd has dtype Double"):
        backward(GOOD, GOOD, WEIGHT, rstd.double())


def test_reference_refuses_what_broadcasting_would_hide():
    with pytest.raises(RuntimeError, match=r"weight has shape \[1\]; it must be \[8\]"):
        ops.rms_norm(GOOD, WEIGHT[:1], EPS, implementation="reference")
    with pytest.raises(RuntimeError, match=r"residual has shape \[8\]; it must be \[2, 3, 8\]"):
        ops.add_rms_norm(GOOD, WEIGHT, WEIGHT, EPS, implementation="reference")
    with pytest.raises(
        RuntimeError, match="weight is torch.bfloat16 on cpu; it must be torch.float32 on cpu"
    ):
        ops.rms_norm(GOOD, WEIGHT.bfloat16(), EPS, implementation="reference")


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match='implementation is \'fast\'; allowed: "fused", "reference"'):
        ops.rms_norm(GOOD, WEIGHT, EPS, implementation="fast")


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_instruction_sets(isa):
    """Again, in a process that may use no wider vectors than `isa`."""
    run_again_on(isa, __file__, "test_any_shape")
