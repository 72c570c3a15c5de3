"""The CUDA kernels of SwiGLU, executed on the CPU thread by thread (cuda_on_host.h), against fp64."""

import ctypes
import subprocess

import pytest
import torch
from toolchain import CSRC, ROOT, require_cuda_headers, require_cxx

from solar_mega.ops import swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "swiglu_on_host.so"
    here = ROOT / "tests" / "ops"
    includes = [f"-I{CSRC}", f"-I{here}", f"-I{require_cuda_headers()}"]
    command = [require_cxx(), "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(here / "swiglu_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def rows(tensor):
    """common/rows.h of a [outer, inner, width] view: count, inner, inner_stride, outer_stride."""
    outer, inner, _ = tensor.shape
    return (ctypes.c_int64 * 4)(outer * inner, inner, tensor.stride(1), tensor.stride(0))


def run_on_host(kernels, x, dy, wide, seed=0):
    """(y, dx); outputs start out as NaN."""
    y = torch.full(dy.shape, float("nan"), dtype=x.dtype)
    dx = torch.full(x.shape, float("nan"), dtype=x.dtype)
    for gradient, out in ((None, y), (dy, dx)):
        pointers = (ctypes.c_void_p * 3)(
            x.data_ptr(), None if gradient is None else gradient.data_ptr(), out.data_ptr()
        )
        kernels.host_swiglu(DTYPES.index(x.dtype), pointers, rows(x), rows(dy), dy.shape[-1], wide, seed)
    return y, dx


def check(got, x, dy):
    """Against fp64, within one rounding of the output and the fp32 noise of its terms."""
    leaf = x.double().requires_grad_()
    y = swiglu_reference(leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    terms = (dy.abs().max() * x.abs().max() + 1).double() * (x.abs().max().double() + 1)
    for mine, want in zip(got, (y.detach(), dx), strict=True):
        bound = torch.finfo(mine.dtype).eps / 2 * want.abs() + 8 * torch.finfo(torch.float32).eps * terms
        error = (mine.double() - want).abs()
        assert (error <= bound).all(), f"error over bound {(error / bound).max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "width, wide", [(1, False), (7, False), (8, True), (264, True), (2056, True), (300, False)]
)
def test_kernels_match_fp64(kernels, dtype, width, wide):
    torch.manual_seed(width)
    x, dy = (torch.randn(4, 2, 2 * width) * 3).to(dtype), torch.randn(4, 2, width).to(dtype)
    check(run_on_host(kernels, x, dy, wide), x, dy)


@pytest.mark.parametrize("wide", [True, False], ids=["vectors", "elements"])
def test_strided_rows(kernels, wide):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 128).transpose(0, 1)  # [s, b, .] view of [b, s, .]
    dy = torch.randn(4, 3, 128)[..., :64]
    check(run_on_host(kernels, x, dy, wide, seed=3), x, dy)


def test_saturated_gates(kernels):
    x = torch.tensor([[[-1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0]]])
    y, dx = run_on_host(kernels, x, torch.ones(1, 1, 4), wide=True)
    assert torch.equal(y[0, 0, 2:], torch.tensor([90.0, 1e4])) and (y[0, 0, :2].abs() < 1e-30).all()
    assert dx.isfinite().all()
