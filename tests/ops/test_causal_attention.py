"""Causal attention's compiled op for the CPU against fp64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from solar_mega import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def low_precision_formula(q, k, v, window=0, cu_seqlens=None):
    """What PyTorch code in the tensors' own dtype computes: every step rounded."""
    s, per = q.shape[0], q.shape[2] // k.shape[2]
    q, k, v = q.permute(1, 2, 0, 3), k.repeat_interleave(per, 2), v.repeat_interleave(per, 2)
    scores = q @ k.permute(1, 2, 3, 0) / q.shape[-1] ** 0.5
    distance = torch.arange(s)[:, None] - torch.arange(s)
    seen = (distance >= 0) & (distance < (window or s))
    if cu_seqlens is not None:
        sample = torch.repeat_interleave(cu_seqlens.diff())
        seen &= sample[:, None] == sample
    probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (probabilities @ v.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)


def run(function, q, k, v, dout, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, **options)
    gradients = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def check_against_fp64(q, k, v, dout, **options):
    """Every output errs at most twice as much as the low-precision formula, plus one rounding of the largest
    output and of fp32 sums as long as the sequence.
    """
    got, rough = (run(f, q, k, v, dout, **options) for f in (ops.causal_attention, low_precision_formula))
    wide = [t.double() for t in (q, k, v, dout)]
    exact = run(ops.causal_attention_reference, *wide, **options)
    for name, want in exact.items():
        assert got[name].shape == want.shape and got[name].dtype == q.dtype
        error, allowed = (got[name].double() - want).abs(), (rough[name].double() - want).abs()
        slack = (torch.finfo(q.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps) * want.abs().max()
        slack += 16 * torch.finfo(torch.float32).eps * dout.abs().max().double() * v.abs().max().double()
        assert got[name].isfinite().all(), name
        assert error.max() <= 2 * allowed.max() + slack, (name, error.max(), allowed.max())
        assert error.mean() <= 2 * allowed.mean() + slack, name


def inputs(s, b, groups, per, d, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = ((s, b, groups * per, d), (s, b, groups, d), (s, b, groups, d), (s, b, groups * per, d))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


SHAPES = {  # s, b, groups, per, d
    "one of everything": (1, 1, 1, 1, 1),
    "grouped": (130, 2, 2, 2, 64),
    "multi-query": (65, 1, 1, 4, 32),
    "multi-head": (64, 2, 3, 1, 16),
    "wide heads": (70, 1, 1, 2, 128),
    "odd sizes": (77, 3, 1, 3, 41),
    "several chunks": (1100, 1, 1, 1, 24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_fp64(dtype, name):
    check_against_fp64(*inputs(*SHAPES[name], dtype))


@pytest.mark.parametrize("window", [1, 2, 31, 64, 65, 600, 1099, 1100, 5000])
def test_sliding_window(window):
    check_against_fp64(*inputs(1100, 1, 1, 2, 8), window=window)


@settings(max_examples=25, deadline=None)
@given(
    s=st.integers(1, 200),
    b=st.integers(1, 2),
    groups=st.integers(1, 2),
    per=st.integers(1, 3),
    d=st.integers(1, 70),
    window=st.integers(0, 220),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(s, b, groups, per, d, window, dtype):
    check_against_fp64(*inputs(s, b, groups, per, d, dtype, seed=s * 100 + d), window=window)


PACKED = {
    "one sample": [0, 700],
    "of all lengths": [0, 1, 2, 66, 130, 131, 300, 699, 700],
    "short ones": list(range(0, 700, 7)) + [700],
    "empty ones": [0, 0, 64, 64, 64, 700, 700],
}


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_samples(name, dtype, window):
    case = inputs(700, 1, 1, 2, 8, dtype)
    cu_seqlens = torch.tensor(PACKED[name], dtype=torch.int32)
    check_against_fp64(*case, window=window, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", PACKED)
def test_packed_samples_are_what_they_are_alone(name):
    """In fp32 but for the order of sums, which depends on where a sample lies."""
    case = inputs(700, 2, 2, 2, 16)
    packed = run(ops.causal_attention, *case, cu_seqlens=torch.tensor(PACKED[name], dtype=torch.int32))
    for begin, end in itertools.pairwise(PACKED[name]):
        alone = run(ops.causal_attention, *(t[begin:end] for t in case))
        for key, want in alone.items():
            torch.testing.assert_close(packed[key][begin:end], want, rtol=1e-5, atol=1e-5)


def test_nothing_of_one_sample_reaches_another():
    """To the bit, whatever the others hold."""
    cu_seqlens = torch.tensor([0, 70, 150, 230], dtype=torch.int32)
    q, k, v, dout = inputs(230, 1, 2, 2, 16)
    want = run(ops.causal_attention, q, k, v, dout, cu_seqlens=cu_seqlens)
    others = torch.cat([torch.arange(70), torch.arange(150, 230)])
    for t in (q, k, v, dout):
        t[others] = torch.randn(t[others].shape) * 1e4
    got = run(ops.causal_attention, q, k, v, dout, cu_seqlens=cu_seqlens)
    for name in want:
        assert torch.equal(got[name][70:150], want[name][70:150]), name


@pytest.mark.parametrize("scale", [1e-4, 30.0], ids=str)
def test_flat_and_peaked_attention(scale):
    """Scores far apart: nearly one-hot rows, whose other exponentials underflow."""
    q, k, v, dout = inputs(150, 1, 2, 1, 32)
    check_against_fp64(q * scale, k * scale, v, dout)


def test_rising_scores_rescale_earlier_chunks():
    """Each chunk's scores far above those before it: the online softmax forgets what it had."""
    q, k, v, dout = inputs(1300, 1, 1, 1, 8)
    k = k * torch.linspace(0.1, 40, 1300)[:, None, None, None]
    check_against_fp64(q, k, v, dout)


def test_nan_does_not_reach_earlier_queries():
    q, k, v, dout = inputs(100, 1, 1, 1, 16)
    k[70] = float("nan")
    out = ops.causal_attention(q, k, v)
    assert out[:70].isfinite().all() and out[70:].isnan().all()


def test_strided_and_misaligned_tensors():
    q, k, v, dout = inputs(40, 3, 2, 2, 32)
    want = run(ops.causal_attention, q, k, v, dout)
    packed = torch.cat([q.view(40, 3, 2, 64), k, v], -1)  # [q q k v] per group, as Megatron packs them
    views = {
        "[b, heads, s, d]": [t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v, dout)],
        "misaligned": [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (q, k, v, dout)],
        "parts of packed rows": [q, packed[..., 64:96], packed[..., 96:], dout],
        "gradient in columns": [q, k, v, dout.transpose(2, 3).contiguous().transpose(2, 3)],
    }
    for name, tensors in views.items():
        got = run(ops.causal_attention, *tensors)
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_two_runs_and_any_number_of_threads_agree_to_the_bit():
    case = inputs(200, 2, 2, 3, 40, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(ops.causal_attention, *case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_inputs_and_saved_tensors_stay_as_they_are():
    q, k, v, dout = inputs(70, 1, 2, 2, 16)
    before = [t.clone() for t in (q, k, v, dout)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = ops.causal_attention(*leaves)
    kept = out.detach().clone()
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(kept, out)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, dout), strict=True))


def test_empty_batch():
    q, k, v, dout = inputs(0, 1, 1, 1, 8)
    assert run(ops.causal_attention, q, k, v, dout)["dk"].shape == (0, 1, 1, 8)


def test_reference_passes_gradcheck():
    leaves = [t.requires_grad_() for t in inputs(5, 1, 1, 2, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: ops.causal_attention_reference(*a, None, 3), leaves)


def test_opcheck():
    q, k, v, dout = inputs(9, 2, 2, 2, 16)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    library = torch.ops.solar_mega
    opcheck(library.causal_attention.default, (*leaves, 0.25))
    opcheck(library.causal_attention.default, (*leaves, 0.25, 4))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    opcheck(library.causal_attention.default, (*leaves, 0.25, 0, cu_seqlens))
    _, stats = library.causal_attention(q, k, v, 0.25)
    opcheck(library.causal_attention_backward.default, (dout, q, k, v, stats, 0.25))
    opcheck(library.causal_attention_backward.default, (dout, q, k, v, stats, 0.25, 0, cu_seqlens))


def test_compiles_into_one_graph():
    q, k, v, _ = inputs(9, 2, 2, 2, 16)
    leaves = [q.clone().requires_grad_() for _ in range(2)]
    ops.causal_attention(leaves[0].sin(), k, v).sum().backward()
    compiled = torch.compile(
        lambda t: ops.causal_attention(t.sin(), k, v).sum(), backend="aot_eager", fullgraph=True
    )
    compiled(leaves[1]).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_recomputation_gives_the_same_gradient():
    case = inputs(70, 1, 2, 2, 16)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(ops.causal_attention, *args, use_reentrant=False)

    kept, again = run(ops.causal_attention, *case), run(recomputed, *case)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


Q, K = torch.zeros(5, 2, 4, 8), torch.zeros(5, 2, 2, 8)
BAD = {
    "dtype of q": ((Q.double(), K, K), {}, "q has dtype Double; allowed: Float, BFloat16, Half"),
    "dtype of k": ((Q, K.bfloat16(), K), {}, "k has dtype BFloat16; it must be Float, as q"),
    "heads": ((Q[:, :, :3], K, K), {}, r"q has shape \[5, 2, 3, 8\] and k \[5, 2, 2, 8\]; allowed:"),
    "length": ((Q, K[:4], K[:4]), {}, r"q has shape \[5, 2, 4, 8\] and k \[4, 2, 2, 8\]; allowed:"),
    "shape of v": ((Q, K, K[..., :7]), {}, r"v has shape \[5, 2, 2, 7\]; it must be \[5, 2, 2, 8\]"),
    "last stride": (
        (Q.transpose(2, 3).contiguous().transpose(2, 3), K, K),
        {},
        "q .* allowed: last stride 1",
    ),
    "window": ((Q, K, K), {"window": -1}, "window is -1; allowed: 0"),
    "scale": ((Q, K, K), {"scale": float("nan")}, "scale is -?nan; allowed: a finite number"),
    "offsets' dtype": (
        (Q, K, K),
        {"cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens has dtype Long; it must be Int",
    ),
    "offsets' end": (
        (Q, K, K),
        {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
        "cu_seqlens runs from 0 to 4; it must cover all positions, 0 to 5",
    ),
    "offsets' order": (
        (Q, K, K),
        {"cu_seqlens": torch.tensor([0, 4, 3, 5], dtype=torch.int32)},
        "cu_seqlens goes from 4 to 3 at index 2",
    ),
    "offsets beyond": (
        (Q, K, K),
        {"cu_seqlens": torch.tensor([0, 9, 5], dtype=torch.int32)},
        "cu_seqlens goes from 0 to 9 at index 1",
    ),
    "no offsets": (
        (Q, K, K),
        {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
        r"cu_seqlens has shape \[0\]; allowed: contiguous",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    args, options, message = BAD[name]
    with pytest.raises(RuntimeError, match=f"^causal_attention: {message}"):
        ops.causal_attention(*args, **options)


def test_bad_gradients_are_refused():
    backward, stats = torch.ops.solar_mega.causal_attention_backward, torch.zeros(2, 4, 5, 2)
    with pytest.raises(RuntimeError, match=r"dout has shape \[5, 2, 2, 8\]; it must be \[5, 2, 4, 8\]"):
        backward(K, Q, K, K, stats, 1.0)
    with pytest.raises(RuntimeError, match=r"stats has shape \[2, 4, 5\]; it must be contiguous"):
        backward(Q, Q, K, K, stats[..., 0], 1.0)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_narrower_instruction_sets(isa):
    """Random shapes again, in a process that may use no wider vectors than `isa`."""
    if os.environ.get("SOLAR_MEGA_CPU_ISA"):
        pytest.skip("already inside such a process")
    environment = os.environ | {"SOLAR_MEGA_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "any_shape"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if f"SOLAR_MEGA_CPU_ISA={isa}: this machine allows base up to" in done.stdout:
        pytest.skip(f"this machine's processor has no {isa}")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
