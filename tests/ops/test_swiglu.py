"""SwiGLU's compiled ops against fp64, on every device that has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from solar_mega import ops
from tests.ops.devices import DEVICES, DTYPES, NARROWER, run_again_on

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def low_precision_formula(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def run(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


def check_against_fp64(x, dy):
    """Every output errs at most twice as much as the low-precision formula, plus a few fp32 and one output
    rounding.
    """
    got, rough = run(ops.swiglu, x, dy), run(low_precision_formula, x, dy)
    exact = run(ops.swiglu_reference, x.double(), dy.double())
    unit = torch.finfo(x.dtype)
    for name, want in exact.items():
        error, allowed = (got[name].double() - want).abs(), (rough[name].double() - want).abs()
        terms = want.abs().max() + (dy.abs().max() * x.abs().max()).double()
        slack = (
            unit.eps / 2 * want.abs().max()
            + 8 * torch.finfo(torch.float32).eps * terms
            + unit.smallest_normal
        )
        assert got[name].isfinite().all(), name
        assert error.max() <= 2 * allowed.max() + slack, (name, error.max(), allowed.max())
        assert error.mean() <= 2 * allowed.mean() + slack, name


def inputs(shape, dtype, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=random) * 2
    return x.to(device, dtype), torch.randn(shape, generator=random).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 7), (3, 2, 64), (33, 257), (4, 3, 1536)], ids=str)
def test_matches_fp64(device, dtype, shape):
    check_against_fp64(*inputs(shape, dtype, device))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_any_shape(rows, width, dtype):
    check_against_fp64(*inputs((rows, width), dtype, seed=rows * 1000 + width))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [20.0, 87.0, 89.0, 1e4, 1e30])
def test_saturated_gates(device, dtype, value):
    """σ is 0 or 1 to the last bit and e^−g over- or underflows: silu is 0 or g, never NaN."""
    for gate in (value, -value):
        x = torch.tensor([[gate, 0.5]], device=device).to(dtype)
        dy = torch.ones(1, 1, device=device, dtype=dtype)
        got = run(ops.swiglu, x, dy)
        want = run(ops.swiglu_reference, x.double(), dy.double())
        for name in got:
            torch.testing.assert_close(got[name].double(), want[name], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_where_it_is(device):
    x, dy = inputs((4, 96), torch.float32, device)
    x[2, 5], x[3, 96 + 7] = float("nan"), float("nan")
    y = ops.swiglu(x)
    assert y[2, 5].isnan() and y[3, 7].isnan() and y.isnan().sum() == 2


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_misaligned_tensors(device):
    x, dy = inputs((3, 8, 64), torch.float32, device)
    want = run(ops.swiglu, x, dy)
    wide = torch.zeros(3, 8, 200, device=device)
    wide[..., :128] = x
    views = {
        "transposed [b, s]": x.transpose(0, 1).contiguous().transpose(0, 1),
        "part of each row": wide[..., :128],
        "misaligned start": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }
    for name, view in views.items():
        got = run(ops.swiglu, view, dy.transpose(0, 1).contiguous().transpose(0, 1))
        assert all(torch.equal(got[key], want[key]) for key in want), name
    columns = dy.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(ops.swiglu, x, columns)["dx"], want["dx"])
    ones = torch.ones((), device=device).expand(3, 8, 64)
    assert torch.equal(run(ops.swiglu, x, ones)["dx"], run(ops.swiglu, x, ones.contiguous())["dx"])


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_agree_to_the_bit_and_empty_batches_pass(device):
    case = inputs((70, 500), torch.bfloat16, device)
    first, second = (run(ops.swiglu, *case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run(ops.swiglu, *inputs((0, 4), torch.float32, device))["dx"].shape == (0, 8)


def test_reference_passes_gradcheck():
    x, _ = inputs((3, 5), torch.float64)
    assert torch.autograd.gradcheck(ops.swiglu_reference, (x.requires_grad_(),))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, dy = inputs((4, 3, 24), torch.float32, device)
    opcheck(torch.ops.solar_mega.swiglu.default, (x.clone().requires_grad_(),))
    opcheck(torch.ops.solar_mega.swiglu.default, (x.transpose(0, 1),))
    opcheck(torch.ops.solar_mega.swiglu_backward.default, (dy, x))


def test_compiles_into_one_graph():
    x, _ = inputs((4, 24), torch.float32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ops.swiglu(leaves[0].sin()).sum().backward()
    torch.compile(lambda t: ops.swiglu(t.sin()).sum(), backend="aot_eager", fullgraph=True)(
        leaves[1]
    ).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 4).double(), "x has dtype Double; allowed: Float, BFloat16, Half"),
        (torch.zeros(3, 5), r"x has shape \[3, 5\]; allowed: \[\.\.\., 2 \* width\]"),
        (torch.zeros(3, 0), r"x has shape \[3, 0\]; allowed:"),
        (torch.tensor(1.0), r"x has shape \[\]; allowed:"),
        (torch.zeros(8, 3).t(), r"x .* Call \.contiguous\(\) on it"),
    ],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(RuntimeError, match=f"^swiglu: {message}"):
        ops.swiglu(x)


def test_bad_gradients_are_refused():
    backward = torch.ops.solar_mega.swiglu_backward
    with pytest.raises(RuntimeError, match=r"^swiglu_backward: dy has shape \[3, 4\]; it must be \[3, 2\]"):
        backward(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="dy has dtype BFloat16; it must be Float, as x"):
        backward(torch.zeros(3, 2).bfloat16(), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"swiglu: x has shape \[5\]"):
        ops.swiglu(torch.zeros(5), implementation="reference")


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_instruction_sets(isa):
    """Random shapes again, in a process that may use no wider vectors than `isa`."""
    run_again_on(isa, __file__, "any_shape")
