"""The CUDA kernels of qkv_rotary, executed on the CPU thread by thread (cuda_on_host.h), against fp64."""

import ctypes
import subprocess

import pytest
import torch
from toolchain import CSRC, ROOT, require_cuda_headers, require_cxx

from solar_mega.ops import qkv_rotary_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "qkv_rotary_on_host.so"
    here = ROOT / "tests" / "ops"
    includes = [f"-I{CSRC}", f"-I{here}", f"-I{require_cuda_headers()}"]
    command = [require_cxx(), "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(here / "qkv_rotary_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run_on_host(kernels, packed, q, k, v, cos, sin, positions, backward, interleaved, aligned, seed=0):
    s, b, heads, d = q.shape
    groups = k.shape[2]
    tensors = (packed, q, k, v, cos, sin, positions)
    pointers = (ctypes.c_void_p * 7)(*(None if t is None else t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * 7)(s, b, groups, heads // groups, d, cos.shape[1], cos.shape[0])
    steps = [step for t in (packed, q, k, v) for step in t.stride()[:3]]
    if positions is not None:
        steps += [positions.stride(0), positions.stride(1) if positions.dim() == 2 else 0]
    steps = (ctypes.c_int64 * 14)(*steps)
    code = DTYPES.index(packed.dtype)
    return kernels.host_rotary(code, pointers, sizes, steps, backward, interleaved, aligned, 3, seed)


def forward_and_backward(
    kernels, qkv, grads, cos, sin, positions=None, interleaved=False, aligned=True, seed=0
):
    """(tokens per block, q, k, v, dqkv); outputs start out as NaN."""
    outputs = [torch.full(g.shape, NAN, dtype=qkv.dtype) for g in grads]
    dqkv = torch.full(qkv.shape, NAN, dtype=qkv.dtype)
    tail = (cos, sin, positions)
    tokens = run_on_host(kernels, qkv, *outputs, *tail, False, interleaved, aligned, seed)
    assert run_on_host(kernels, dqkv, *grads, *tail, True, interleaved, aligned, seed) == tokens
    return tokens, *outputs, dqkv


def inputs(s, b, groups, per_group, d, half, dtype, rows=40):
    torch.manual_seed(s * 1000 + d)
    qkv = torch.randn(s, b, groups, (per_group + 2) * d).to(dtype)
    grads = [torch.randn(s, b, n, d).to(dtype) for n in (groups * per_group, groups, groups)]
    return qkv, grads, torch.randn(rows, half), torch.randn(rows, half)


def check(got, qkv, grads, cos, sin, positions=None, interleaved=False):
    """Against fp64, within one rounding of the output and the fp32 noise of the two terms summed into it."""
    leaf = qkv.double().requires_grad_()
    per_group = grads[0].shape[2] // grads[1].shape[2]
    outputs = qkv_rotary_reference(leaf, cos.double(), sin.double(), per_group, positions, interleaved)
    (dqkv,) = torch.autograd.grad(outputs, leaf, [g.double() for g in grads])
    noise = 4 * torch.finfo(torch.float32).eps * max(t.double().abs().max() for t in (qkv, *grads)) * 10
    for name, mine, want in zip(("q", "k", "v", "dqkv"), got[1:], (*outputs, dqkv), strict=True):
        bound = torch.finfo(mine.dtype).eps / 2 * want.abs() + noise
        error = (mine.double() - want).abs()
        assert (error <= bound).all(), f"{name}: error over bound {(error / bound).max():.3g}"


# s, b, groups, per_group, d, half -> tokens per block with 16-bit dtypes, 0 for the elements kernel.
SHAPES = {
    (5, 2, 2, 4, 128, 64): 1,
    (3, 1, 8, 4, 128, 64): 1,
    (7, 3, 2, 1, 64, 32): 5,
    (9, 1, 1, 1, 16, 8): 42,
    (4, 2, 1, 3, 80, 16): 12,
    (4, 2, 1, 2, 48, 24): 10,
    (5, 1, 2, 2, 10, 5): 0,
    (3, 2, 1, 1, 7, 2): 0,
    (2, 1, 1, 2, 2, 1): 0,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_kernels_match_fp64(kernels, dtype, shape, interleaved):
    case = inputs(*shape, dtype)
    got = forward_and_backward(kernels, *case, interleaved=interleaved)
    if dtype != torch.float32:  # fp32 vectors hold half as many elements
        assert got[0] == SHAPES[shape]
    check(got, *case, interleaved=interleaved)


@pytest.mark.parametrize("aligned", [True, False], ids=["vectors", "elements"])
def test_strides_and_positions(kernels, aligned):
    shape = (6, 3, 2, 2, 32, 16)
    qkv, grads, cos, sin = inputs(*shape, torch.bfloat16)
    want = forward_and_backward(kernels, qkv, grads, cos, sin)
    moved = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    by_head = [g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in grads]
    got = forward_and_backward(kernels, moved, by_head, cos, sin, aligned=aligned)
    assert (got[0] > 0) == aligned
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    for positions in (torch.randint(0, 40, (6,)), torch.randint(0, 40, (3, 6)).t()):
        got = forward_and_backward(kernels, qkv, grads, cos, sin, positions, aligned=aligned)
        check(got, qkv, grads, cos, sin, positions)


@pytest.mark.parametrize("aligned", [True, False], ids=["vectors", "elements"])
def test_a_position_outside_the_tables_gives_nan_there_only(kernels, aligned):
    qkv, grads, cos, sin = inputs(5, 1, 2, 2, 32, 8, torch.float32)
    positions = torch.tensor([0, 40, 2, -1, 4])
    _, q, k, v, dqkv = forward_and_backward(kernels, qkv, grads, cos, sin, positions, aligned=aligned)
    good = torch.tensor([0, 2, 4])
    for turned in (q, k):
        assert turned[[1, 3], ..., :16].isnan().all() and turned[..., 16:].isfinite().all()
        assert turned[good].isfinite().all()
    assert v.isfinite().all() and dqkv[good].isfinite().all() and dqkv[[1, 3]].isnan().any()


def test_order_of_threads_and_blocks_does_not_matter(kernels):
    case = inputs(11, 2, 2, 3, 64, 32, torch.bfloat16)
    runs = [forward_and_backward(kernels, *case, seed=seed)[1:] for seed in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
