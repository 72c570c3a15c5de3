"""The rotary op against fp64, on every device that has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from solar_mega import ops
from tests.ops.devices import DEVICES, DTYPES, NARROWER, run_again_on

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def tables(rows, half, device="cpu", scale=1.0):
    angles = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(half) / half)
    return tuple((f(angles) * scale).float().to(device) for f in (torch.cos, torch.sin))


def inputs(s, b, groups, per_group, d, half, dtype=torch.float32, device="cpu", seed=0, rows=64):
    """(qkv, (dq, dk, dv), cos, sin)."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random).to(device, dtype)

    qkv = draw(s, b, groups, (per_group + 2) * d)
    grads = draw(s, b, groups * per_group, d), draw(s, b, groups, d), draw(s, b, groups, d)
    return qkv, grads, *tables(max(rows, s), half, device)


def low_precision_formula(qkv, cos, sin, per_group, positions=None, interleaved=False):
    """What PyTorch code in the tensors' own dtype computes: tables and every step rounded."""
    s, b, groups, width = qkv.shape
    heads = qkv.view(s, b, groups, per_group + 2, -1)
    at = torch.arange(s, device=qkv.device) if positions is None else positions
    c, n = (t[at].to(qkv.dtype).view(s, -1, 1, 1, t.shape[1]) for t in (cos, sin))
    half = c.shape[-1]
    x, rest = heads[..., :-1, : 2 * half], heads[..., :-1, 2 * half :]
    if interleaved:
        a, e = x[..., 0::2], x[..., 1::2]
        x = torch.stack([a * c - e * n, e * c + a * n], -1).flatten(-2)
    else:
        c, n = torch.cat([c, c], -1), torch.cat([n, n], -1)
        x = x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * n
    x = torch.cat([x, rest], -1)
    return x[..., :-1, :].reshape(s, b, groups * per_group, -1), x[..., -1, :], heads[..., -1, :]


def run(function, qkv, grads, *args, **options):
    qkv = qkv.detach().requires_grad_()
    outputs = function(qkv, *args, **options)
    (dqkv,) = torch.autograd.grad(outputs, qkv, grads)
    return dict(zip(("q", "k", "v", "dqkv"), (*outputs, dqkv), strict=True))


def check_against_fp64(qkv, grads, cos, sin, per_group, **options):
    """Every output errs at most twice as much as the low-precision formula, plus one rounding."""
    got = run(ops.qkv_rotary, qkv, grads, cos, sin, per_group, **options)
    rough = run(low_precision_formula, qkv, grads, cos, sin, per_group, **options)
    wide = (qkv.double(), [g.double() for g in grads], cos.double(), sin.double(), per_group)
    exact = run(ops.qkv_rotary_reference, *wide, **options)
    for name, want in exact.items():
        assert got[name].shape == want.shape and got[name].dtype == qkv.dtype
        error, allowed = (got[name].double() - want).abs(), (rough[name].double() - want).abs()
        slack = torch.finfo(qkv.dtype).eps / 2 * want.abs().max() + torch.finfo(qkv.dtype).smallest_normal
        assert error.max() <= 2 * allowed.max() + slack, (name, error.max(), allowed.max())
        assert error.mean() <= 2 * allowed.mean() + slack, name
    assert torch.equal(got["v"], rough["v"])


SHAPES = {  # s, b, groups, per_group, head_dim, half
    "one of everything": (1, 1, 1, 1, 2, 1),
    "multi-head": (5, 2, 4, 1, 16, 8),
    "grouped": (7, 3, 2, 4, 64, 32),
    "multi-query": (3, 2, 1, 8, 128, 64),
    "partial rotary": (6, 1, 2, 2, 80, 16),
    "odd sizes": (5, 3, 3, 3, 10, 3),
    "odd head": (4, 2, 2, 1, 7, 3),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_fp64(device, dtype, interleaved, name):
    shape = SHAPES[name]
    check_against_fp64(*inputs(*shape, dtype, device), shape[3], interleaved=interleaved)


@pytest.mark.parametrize("device", DEVICES)
def test_positions(device):
    qkv, grads, cos, sin = inputs(12, 2, 2, 2, 32, 16, device=device)
    restart = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], device=device)  # three samples in a row
    per_sample = torch.stack([restart, restart.flip(0)], 1)
    for positions in (restart, per_sample, per_sample.t().contiguous().t(), per_sample[:, :1].expand(12, 2)):
        check_against_fp64(qkv, grads, cos, sin, 2, positions=positions)
    places = torch.arange(12, device=device)
    default = run(ops.qkv_rotary, qkv, grads, cos, sin, 2)
    given_places = run(ops.qkv_rotary, qkv, grads, cos, sin, 2, positions=places)
    assert all(torch.equal(default[name], given_places[name]) for name in default)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-6, 1e4], ids=str)
def test_magnitudes(device, scale):
    for dtype in (torch.float32, torch.bfloat16):
        qkv, grads, cos, sin = inputs(6, 2, 2, 2, 64, 32, dtype, device)
        check_against_fp64(qkv * scale, [g * scale for g in grads], cos, sin, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_tables_may_scale(device):
    """Rope variants multiply cos and sin (YaRN): the backward is then the transpose, not the inverse."""
    qkv, grads, _, _ = inputs(6, 2, 2, 2, 64, 32, device=device)
    check_against_fp64(qkv, grads, *tables(8, 32, device, scale=1.25), 2)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_misaligned_tensors(device):
    qkv, grads, cos, sin = inputs(8, 3, 2, 2, 64, 32, device=device)
    want = run(ops.qkv_rotary, qkv, grads, cos, sin, 2)
    flat = torch.zeros(qkv.numel() + 1, device=device)
    flat[1:] = qkv.flatten()
    wide = torch.zeros(*qkv.shape[:3], 300, device=device)
    wide[..., :256] = qkv
    views = {
        "transposed [b, s]": qkv.transpose(0, 1).contiguous().transpose(0, 1),
        "misaligned start": flat[1:].view(qkv.shape),
        "part of each row": wide[..., :256],
    }
    for name, view in views.items():
        got = run(ops.qkv_rotary, view, grads, cos, sin, 2)
        assert all(torch.equal(got[key], want[key]) for key in want), name
    transposed = [g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in grads]  # [b, heads, s, d]
    misaligned = [torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape) for g in grads]
    columns = [g.transpose(2, 3).contiguous().transpose(2, 3) for g in grads]
    for others in (transposed, misaligned, columns):
        got = run(ops.qkv_rotary, qkv, others, cos, sin, 2)
        assert torch.equal(got["dqkv"], want["dqkv"])


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_when_only_one_output_is_used(device):
    qkv, _, cos, sin = inputs(4, 2, 2, 2, 16, 8, device=device)
    for used in range(3):
        gradients = []
        for implementation in ("fused", "reference"):
            leaf = qkv.clone().requires_grad_()
            ops.qkv_rotary(leaf, cos, sin, 2, implementation=implementation)[used].sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_turning_back_gives_the_input(device, interleaved):
    """Rotations keep lengths: the backward of the outputs themselves is the packed input."""
    qkv, _, cos, sin = inputs(9, 2, 2, 3, 64, 32, device=device)
    outputs = ops.qkv_rotary(qkv, cos, sin, 3, interleaved=interleaved)
    back = run(ops.qkv_rotary, qkv, outputs, cos, sin, 3, interleaved=interleaved)["dqkv"]
    torch.testing.assert_close(back, qkv, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_overwritten(device):
    """Saved or shared tensors stay as they are: recomputation and double use see the same values."""
    qkv, grads, cos, sin = inputs(4, 2, 2, 2, 16, 8, device=device)
    tensors = [qkv, *grads, cos, sin]
    before = [t.clone() for t in tensors]
    leaf = qkv.clone().requires_grad_()
    outputs = ops.qkv_rotary(leaf, cos, sin, 2)
    kept = [o.detach().clone() for o in outputs]
    first = torch.autograd.grad(outputs, leaf, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, leaf, grads)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip([*tensors, *kept], [*before, *outputs], strict=True))
    assert not {o.untyped_storage().data_ptr() for o in outputs} & {leaf.untyped_storage().data_ptr()}


@settings(max_examples=40, deadline=None)
@given(
    s=st.integers(0, 9),
    b=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 4),
    d=st.integers(2, 70),
    part=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)
def test_any_shape(s, b, groups, per_group, d, part, dtype, interleaved):
    half = max(1, int(part * (d // 2)))
    case = inputs(s, b, groups, per_group, d, half, dtype, seed=s * 100 + d)
    if s == 0:
        assert run(ops.qkv_rotary, *case, per_group)["dqkv"].shape == case[0].shape
        return
    check_against_fp64(*case, per_group, interleaved=interleaved)


def test_number_of_threads_does_not_change_a_bit():
    qkv, grads, cos, sin = inputs(300, 2, 2, 4, 64, 32, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(ops.qkv_rotary, qkv, grads, cos, sin, 4))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_agree_to_the_bit(device):
    case = inputs(65, 3, 2, 4, 128, 64, torch.bfloat16, device, rows=80)
    first, second = (run(ops.qkv_rotary, *case, 4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_reference_passes_gradcheck(interleaved):
    qkv, _, cos, sin = (t.double() if isinstance(t, torch.Tensor) else t for t in inputs(3, 2, 2, 2, 6, 2))
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.qkv_rotary_reference(x, cos, sin, 2, None, interleaved), (qkv,)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    qkv, grads, cos, sin = inputs(4, 2, 2, 2, 16, 6, device=device)
    positions = torch.arange(8, device=device).view(4, 2)
    leaf = qkv.clone().requires_grad_()
    library = torch.ops.solar_mega
    opcheck(library.qkv_rotary.default, (leaf, cos, sin, None, 2))
    opcheck(library.qkv_rotary.default, (leaf.transpose(0, 1), cos, sin, positions.t(), 2, True))
    opcheck(library.qkv_rotary_backward.default, (*grads, cos, sin, positions, True))


def test_compiles_into_one_graph():
    qkv, _, cos, sin = inputs(4, 2, 2, 2, 16, 8)

    def block(x):
        q, k, v = ops.qkv_rotary(x.sin(), cos, sin, 2)
        return q.sum() + (k * v).sum()

    leaves = [qkv.clone().requires_grad_() for _ in range(2)]
    block(leaves[0]).backward()
    torch.compile(block, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_recomputation_gives_the_same_gradient():
    case = inputs(6, 2, 2, 2, 16, 8)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(ops.qkv_rotary, *args, use_reentrant=False)

    kept, again = run(ops.qkv_rotary, *case, 2), run(recomputed, *case, 2)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


QKV, COS = torch.zeros(3, 2, 2, 32), torch.zeros(5, 4)
BAD = {
    "dtype of qkv": ((QKV.double(), COS, COS, 2), "qkv has dtype Double; allowed: Float, BFloat16, Half"),
    "queries_per_group": ((QKV, COS, COS, 0), "queries_per_group is 0; allowed: 1 or more"),
    "width": ((QKV, COS, COS, 4), r"qkv has shape \[3, 2, 2, 32\]; allowed: .* with queries_per_group = 4"),
    "dimensions": ((QKV[0], COS, COS, 2), r"qkv has shape \[2, 2, 32\]; allowed: \[s, b, groups,"),
    "last stride": (
        (torch.zeros(3, 2, 32, 2).transpose(2, 3), COS, COS, 2),
        r"qkv .* allowed: last stride 1\. Call \.contiguous\(\)",
    ),
    "dtype of cos": ((QKV, COS.bfloat16(), COS, 2), "cos has dtype BFloat16; it must be Float"),
    "width of cos": ((QKV, torch.zeros(5, 5), COS, 2), r"cos has shape \[5, 5\].* to the head_dim, 8"),
    "stride of sin": ((QKV, COS, torch.zeros(4, 5).t(), 2), r"sin has shape .* allowed: contiguous"),
    "shape of sin": ((QKV, COS, COS[:4], 2), r"sin has shape \[4, 4\]; it must be \[5, 4\]"),
    "rows of cos": ((QKV, COS[:2], COS[:2], 2), "qkv has 3 positions but cos and sin only 2 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    args, message = BAD[name]
    with pytest.raises(RuntimeError, match=f"^qkv_rotary: {message}"):
        ops.qkv_rotary(*args)


@pytest.mark.parametrize(
    "positions, message",
    [
        (torch.zeros(3, dtype=torch.int32), "positions has dtype Int; it must be Long"),
        (torch.zeros(2, 3, dtype=torch.long), r"positions has shape \[2, 3\]; allowed: \[3\] or \[3, 2\]"),
        (torch.tensor([0, 5, 1]), "positions holds 5; allowed: 0 to 4, the rows of cos and sin"),
        (torch.tensor([0, -1, 1]), "positions holds -1; allowed: 0 to 4"),
    ],
)
def test_bad_positions_are_refused(positions, message):
    with pytest.raises(RuntimeError, match=f"^qkv_rotary: {message}"):
        ops.qkv_rotary(QKV, COS, COS, 2, positions=positions)


def test_bad_gradients_are_refused():
    backward = torch.ops.solar_mega.qkv_rotary_backward
    dq, dk = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 2, 8)
    for args, message in (
        ((dq[:, :, :3], dk, dk), r"dq has shape \[3, 2, 3, 8\] and dk \[3, 2, 2, 8\]; allowed:"),
        ((dq, dk, dk[:2]), r"dv has shape \[2, 2, 2, 8\]; it must be \[3, 2, 2, 8\]"),
        ((dq, dk.bfloat16(), dk), "dk has dtype BFloat16; it must be Float, as dq"),
        ((dq, dk, torch.zeros(3, 2, 8, 2).transpose(2, 3)), "dv .* allowed: last stride 1"),
    ):
        with pytest.raises(RuntimeError, match=f"^qkv_rotary_backward: {message}"):
            backward(*args, COS, COS, None)


def test_reference_refuses_what_broadcasting_would_hide():
    for args, options, message in (
        ((QKV, COS, COS[:1], 2), {}, r"cos has shape \[5, 4\] and sin \[1, 4\]"),
        ((QKV, COS, COS, 4), {}, "with queries_per_group = 4"),
        ((QKV, COS[:1], COS[:1], 2), {}, "qkv has 3 positions"),
        ((QKV, COS, COS, 2), {"positions": torch.zeros(1, dtype=torch.long)}, r"positions has shape \[1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.qkv_rotary(*args, **options, implementation="reference")


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_instruction_sets(isa):
    """Random shapes again, in a process that may use no wider vectors than `isa`."""
    run_again_on(isa, __file__, "any_shape")
