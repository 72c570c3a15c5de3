"""The CUDA kernels of RMSNorm, executed on the CPU thread by thread (cuda_on_host.h), against fp64."""

import ctypes
import subprocess

import pytest
import torch
from toolchain import CSRC, ROOT, require_cuda_headers, require_cxx

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "rms_norm_on_host.so"
    here = ROOT / "tests" / "ops"
    includes = [f"-I{CSRC}", f"-I{here}", f"-I{require_cuda_headers()}"]
    command = [require_cxx(), "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(here / "rms_norm_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors: torch.Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def rows(tensor: torch.Tensor | None) -> ctypes.Array:
    """common/rows.h of a [outer, inner, width] view: count, inner, inner_stride, outer_stride."""
    values = (0, 0, 0, 0)
    if tensor is not None:
        outer, inner, _ = tensor.shape
        values = (outer * inner, inner, tensor.stride(1), tensor.stride(0))
    return (ctypes.c_int64 * 4)(*values)


def run_on_host(kernels, x, residual, weight, dy, dresidual, *, offset, aligned=True, seed=0, processors=2):
    """Forward and backward: (K of the kernel, y, sum, rstd, dx, dweight). Outputs start out as NaN."""
    nan = [torch.full(x.shape, float("nan"), dtype=x.dtype) for _ in range(3)]
    y, total, dx = nan
    rstd, dweight = torch.full(x.shape[:-1], float("nan")), torch.full_like(weight, float("nan"))
    code, width, eps = DTYPES.index(x.dtype), x.shape[-1], ctypes.c_float(1e-5)
    tail = (aligned, processors, seed)
    sum_or_none = None if residual is None else total
    inputs = pointers(x, residual, weight, y, sum_or_none, rstd)
    off = ctypes.c_float(offset)
    k = kernels.host_forward(code, inputs, rows(x), rows(residual), width, eps, off, *tail)
    total = x if residual is None else total
    inputs = pointers(dy, total, weight, dresidual, rstd, dx, dweight)
    args = (rows(dy), rows(total), rows(dresidual), width, off, *tail)
    assert kernels.host_backward(code, inputs, *args) == k
    return k, y, total, rstd, dx, dweight


def check(got, x, weight, dy, dresidual, offset):
    """Against fp64, within one rounding of the output and the fp32 noise of the terms summed into it."""
    _, y, _, rstd, dx, dweight = got
    xd, g, dyd = x.double(), weight.double() + offset, dy.double()
    r = torch.rsqrt(xd.square().mean(-1, keepdim=True) + 1e-5)
    u = dyd * g
    extra = 0 if dresidual is None else dresidual.double()
    pull = xd * r**3
    want = {
        "y": (y, xd * r * g, (xd * r * g).abs()),
        "dx": (
            dx,
            u * r - pull * (u * xd).mean(-1, keepdim=True) + extra,
            (u * r).abs() + pull.abs() * (u * xd).abs().mean(-1, keepdim=True) + abs(extra),
        ),
        "dweight": (dweight, (dyd * xd * r).sum((0, 1)), (dyd * xd * r).abs().sum((0, 1))),
        "rstd": (rstd, r.squeeze(-1), r.squeeze(-1)),
    }
    for name, (tensor, value, terms) in want.items():
        bound = torch.finfo(tensor.dtype).eps / 2 * value.abs() + 16 * torch.finfo(torch.float32).eps * terms
        if tensor.dtype == torch.float16:
            bound += 2.0**-25  # half the spacing of its subnormals
        error = (tensor.double() - value).abs()
        assert (error <= bound).all(), f"{name}: error over bound {(error / bound).max():.3g}"


# The K each width takes (16-bit dtypes): odd widths, a lone vector, several rows to a block, partial warps.
WIDTHS = {1: 0, 7: 0, 8: 1, 200: 1, 1032: 2, 4104: 4, 301: 0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add_norm"])
def test_kernels_match_fp64(kernels, dtype, width, add):
    torch.manual_seed(width)
    x, residual, dy, dresidual = (torch.randn(3, 3, width).to(dtype) for _ in range(4))
    weight = torch.randn(width).to(dtype)
    if not add:
        residual = dresidual = None
    offset = 1.0 if width % 16 else 0.0
    k, y, total, rstd, dx, dweight = run_on_host(kernels, x, residual, weight, dy, dresidual, offset=offset)
    if dtype != torch.float32:  # fp32 vectors hold half as many elements
        assert k == WIDTHS[width]
    if add:
        assert torch.equal(total, x + residual)
    check((k, y, total, rstd, dx, dweight), total, weight, dy, dresidual, offset)


def test_order_of_threads_and_blocks_does_not_matter(kernels):
    torch.manual_seed(0)
    x, residual, dy, dresidual = (torch.randn(4, 5, 264).bfloat16() for _ in range(4))
    weight = torch.randn(264).bfloat16()
    runs = [
        run_on_host(kernels, x, residual, weight, dy, dresidual, offset=0.0, seed=seed)[1:]
        for seed in range(4)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("processors", [1, 3, 50])
def test_any_size_of_grid(kernels, processors):
    torch.manual_seed(0)
    x, dy = torch.randn(1, 37, 72).bfloat16(), torch.randn(1, 37, 72).bfloat16()
    weight = torch.randn(72).bfloat16()
    got = run_on_host(kernels, x, None, weight, dy, None, offset=0.0, processors=processors)
    check(got, x, weight, dy, None, 0.0)


@pytest.mark.parametrize("aligned", [True, False], ids=["vectors", "elements"])
def test_strided_rows(kernels, aligned):
    torch.manual_seed(0)
    width = 64
    x = torch.randn(3, 4, width).transpose(0, 1)  # [s, b, h] view of [b, s, h]
    residual = torch.randn(4, 3, 2 * width)[..., :width]  # half of each row
    dy = torch.randn(1, 1, width).expand(4, 3, width)  # the gradient of a sum over rows
    dresidual, weight = torch.randn(4, 3, width), torch.randn(width)
    got = run_on_host(kernels, x, residual, weight, dy, dresidual, offset=0.0, aligned=aligned)
    assert got[0] == (1 if aligned else 0)
    assert torch.equal(got[2], x + residual)
    check(got, got[2], weight, dy, dresidual, 0.0)
