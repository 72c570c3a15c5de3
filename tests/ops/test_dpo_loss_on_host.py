"""The CUDA kernel of the preference loss, run on the CPU thread by thread (cuda_on_host.h), against fp64."""

import ctypes
import subprocess

import pytest
import torch
from toolchain import CSRC, ROOT, require_cuda_headers, require_cxx

from solar_mega.ops.dpo_loss import VARIANTS, DPOLoss, dpo_loss_reference

LENGTHS = [5, 300, 0, 1, 131, 128, 7, 0, 640, 33]
"""Shorter and longer than a block, and empty ones; chosen and rejected in turn."""
PADDING = 19


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "dpo_loss_on_host.so"
    here = ROOT / "tests" / "ops"
    includes = [f"-I{CSRC}", f"-I{here}", f"-I{require_cuda_headers()}"]
    command = [require_cxx(), "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(here / "dpo_loss_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run_on_host(
    kernel,
    logps,
    cu_seqlens,
    mask=None,
    reference_logps=None,
    reference_token_logps=None,
    variant="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    rpo_alpha=0.0,
    rpo_mean="tokens",
    blocks=2,
    seed=0,
) -> tuple[DPOLoss, torch.Tensor]:
    """The outputs and the coefficients. All outputs start out as NaN."""
    pairs, tokens = cu_seqlens.numel() // 2, logps.numel()
    nan = float("nan")
    loss, nll, per_pair = torch.full((), nan), torch.full((), nan), torch.full((5, pairs), nan)
    sums, counts = torch.full((2 * pairs,), nan, dtype=torch.float64), torch.full((2 * pairs,), nan)
    coefficients = torch.full((tokens,), nan)
    wide = None if reference_logps is None or reference_logps.dtype == torch.float32 else reference_logps
    narrow = None if wide is not None else reference_logps
    tensors = (logps, reference_token_logps, wide, narrow, mask, cu_seqlens)
    tensors += (loss, nll, per_pair, sums, counts, coefficients)
    pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    mask_kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    code = list(VARIANTS).index(variant)
    numbers = (ctypes.c_double(v) for v in (beta, label_smoothing, rpo_alpha))
    sizes = (ctypes.c_int64(v) for v in (tokens, pairs, code))
    kernel.host_dpo_loss(pointers, mask_kind, *sizes, *numbers, rpo_mean == "sequences", blocks, seed)
    return DPOLoss(loss, nll, *per_pair.unbind(0), sums, counts), coefficients


def example(mask_dtype=torch.bool, seed=0):
    random = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    tokens = int(ends[-1]) + PADDING
    logps, reference = (-4 * torch.rand(tokens, generator=random) for _ in range(2))
    mask = None
    if mask_dtype is not None:
        mask = (torch.rand(tokens, generator=random) < 0.8).to(mask_dtype)
        for tensor in (logps, reference):
            tensor[mask == 0] = float("nan")
        logps[ends[-1] :] = float("nan")
    if mask_dtype == torch.float32:
        mask = mask * torch.rand(tokens, generator=random)
    return logps, ends.int(), mask, reference


def check(got, coefficients, logps, *args, **options):
    """Against fp64: sums are fp64 and outputs rounded once, so a few units in the last place of fp32."""
    leaf = logps.double().requires_grad_()
    want = dpo_loss_reference(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(want.loss, leaf)
    for name, value, exact in zip(DPOLoss._fields, got, want, strict=True):
        torch.testing.assert_close(
            value.double(), exact, rtol=2e-7, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(coefficients.double(), gradient, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rpo_mean", ["tokens", "sequences"])
def test_kernel_matches_fp64(kernel, variant, rpo_mean):
    logps, cu_seqlens, mask, reference = example()
    options = {"variant": variant, "rpo_alpha": 0.7, "rpo_mean": rpo_mean}
    options["label_smoothing"] = 0.2 if variant in ("sigmoid", "robust") else 0.0
    got, coefficients = run_on_host(kernel, logps, cu_seqlens, mask, None, reference, **options)
    check(got, coefficients, logps, cu_seqlens, mask, None, reference, **options)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("reference", ["none", "fp32", "fp64", "tokens"])
def test_masks_and_references(kernel, mask_dtype, reference):
    logps, cu_seqlens, mask, tokens = example(mask_dtype)
    sums = -3 * torch.tensor(LENGTHS).double()
    given = {
        "none": (None, None),
        "fp32": (sums.float(), None),
        "fp64": (sums, None),
        "tokens": (None, tokens),
    }
    args = (logps, cu_seqlens, mask, *given[reference])
    got, coefficients = run_on_host(kernel, *args, rpo_alpha=0.5)
    check(got, coefficients, *args, rpo_alpha=0.5)


def test_grid_and_order_do_not_matter(kernel):
    logps, cu_seqlens, mask, reference = example()
    runs = []
    for blocks, seed in ((1, 0), (2, 1), (5, 2), (5, 3)):
        got, coefficients = run_on_host(
            kernel, logps, cu_seqlens, mask, None, reference, rpo_alpha=1.0, blocks=blocks, seed=seed
        )
        runs.append((*got, coefficients))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(
    "cu_seqlens",
    [[0, 5, 4, 6, 8], [0, 5, 9, 12, 99], [1, 5, 6, 7, 8], [0, -3, 2, 3, 4], [0, 2**31 - 1, 1, 3, 4]],
)
def test_wrong_offsets_give_nan_and_touch_nothing(kernel, cu_seqlens):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    logps = -torch.ones(12)
    got, _ = run_on_host(kernel, logps, cu_seqlens, rpo_alpha=1.0)
    assert got.loss.isnan() and got.losses.isnan().any()
