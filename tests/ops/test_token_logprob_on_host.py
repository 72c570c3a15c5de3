"""The CUDA kernels of token log-probs, executed on the CPU thread by thread (cuda_on_host.h), against
fp64."""

import ctypes
import subprocess

import pytest
import torch
from toolchain import CSRC, ROOT, require_cuda_headers, require_cxx

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMOOTHING, Z = 0.1, 1e-3


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "token_logprob_on_host.so"
    here = ROOT / "tests" / "ops"
    includes = [f"-I{CSRC}", f"-I{here}", f"-I{require_cuda_headers()}"]
    command = [require_cxx(), "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(here / "token_logprob_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors: torch.Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def int64s(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def layout(x: torch.Tensor) -> ctypes.Array:
    """common/rows.h of a [outer, inner, width] view."""
    outer, inner, _ = x.shape
    return int64s(outer * inner, inner, x.stride(1), x.stride(0))


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class Run:
    """Forward and backward of x [outer, inner, width], its columns split over `shards`; outputs start out as
    NaN."""

    def __init__(self, kernels, x, targets, *, mask=None, size=None, smoothing=0.0, z=0.0, metrics=False,
    shards=1,
                 dlogps=None, inplace=False, out_shift=None, seed=0, grid=2):  # fmt: skip
        rows, width = targets.numel(), x.shape[-1] // shards
        size = x.shape[-1] if size is None else size
        code, terms = DTYPES.index(x.dtype), (ctypes.c_float(smoothing), ctypes.c_float(z))
        block = kernels.host_block(ctypes.c_int64(width), 16 // x.element_size())
        self.logps, self.saved, self.entropy = nan(rows), nan(2, rows), nan(rows) if metrics else None
        self.hit = torch.zeros(rows, dtype=torch.bool) if metrics else None
        results = (self.logps, self.saved, self.entropy, self.hit)
        smooth = smoothing != 0
        stats = nan(shards, 3 + smooth + metrics, rows) if shards > 1 else None
        parts = [x[..., s * width : (s + 1) * width] for s in range(shards)]
        for number, part in enumerate(parts):
            first = number * width
            vocab = int64s(first, max(0, min(size - first, width)), size)
            into = (None if stats is None else stats[number], *(results if stats is None else (None,) * 4))
            p = pointers(part, targets, mask, *into)
            kernels.host_forward(code, p, layout(part), vocab, *terms, smooth, metrics, grid, block, seed)
        if stats is not None:
            p = pointers(stats, *results)
            kernels.host_combine(
                p, ctypes.c_int64(shards), ctypes.c_int64(rows), smooth, metrics, *terms,
                ctypes.c_int64(size), seed
            )  # fmt: skip
        dlogps = torch.ones(rows) if dlogps is None else dlogps
        self.dx = x.clone(memory_format=torch.preserve_format) if inplace else nan(*x.shape, dtype=x.dtype)
        if out_shift is not None:
            self.dx = nan(x.numel() + out_shift, dtype=x.dtype)[out_shift:].view(x.shape)
        for number, part in enumerate(parts):
            first = number * width
            vocab = int64s(first, max(0, min(size - first, width)), size)
            to = self.dx[..., first : first + width]
            source = to if inplace else part
            p = pointers(dlogps, source, targets, self.saved, to)
            kernels.host_backward(
                code, p, layout(source), layout(to), width, vocab, *terms, grid, block, seed
            )


def exact(x, targets, dlogps, *, mask=None, size=None, smoothing=0.0, z=0.0):
    """(logps, entropy, dx) in fp64."""
    x = x.double()[..., :size].flatten(0, 1).detach().requires_grad_()
    counted = (targets != -100) if mask is None else (targets != -100) & mask
    lp, lse = x.log_softmax(-1), x.logsumexp(-1)
    logps = lp.gather(-1, targets.where(counted, 0)[:, None])[:, 0]
    if smoothing:
        logps = (1 - smoothing) * logps + smoothing * lp.mean(-1)
    logps = (logps - z * lse.square()).where(counted, 0)
    entropy = (-(lp.exp() * lp.clamp(min=-1e30)).sum(-1)).where(counted, 0)
    (dx,) = torch.autograd.grad(logps, x, dlogps.double())
    return logps.detach(), entropy.detach(), dx.where(counted[:, None], 0)


def check(run, x, targets, dlogps, size=None, **options):
    """fp32 noise of the terms summed, and one rounding of the gradient's dtype."""
    size = x.shape[-1] if size is None else size
    logps, entropy, dx = exact(x, targets, dlogps, size=size, **options)
    unit, live = torch.finfo(torch.float32).eps, x[..., :size].double().flatten(0, 1)
    live = live.where(live.isfinite(), 0)
    terms = 10 + live.abs().amax(-1) * (1 + options.get("z", 0) * live.abs().amax(-1))
    assert ((run.logps - logps).abs() <= 4 * unit * terms).all()
    if run.entropy is not None:
        assert ((run.entropy - entropy).abs() <= 16 * unit * 12).all()
    got = run.dx.double().flatten(0, 1)
    # The terms that make up an element are p, 1 at the target and ε/V; p errs by its exponent's rounding too,
    # which is |x - max| units.
    flat = x.double()[..., :size].flatten(0, 1)
    p, below = flat.softmax(-1), (flat.amax(-1, keepdim=True) - flat).clamp(max=100)
    hot = torch.zeros_like(p).scatter_(1, targets.clamp(0, size - 1)[:, None], 1.0)
    noise = 4 * unit * dlogps.abs()[:, None] * (p * (2 + below) + hot + 1 / size)
    bound = torch.finfo(x.dtype).eps / 2 * dx.abs() + noise + (2.0**-25 if x.dtype == torch.float16 else 0)
    assert ((got[:, :size] - dx).abs() <= bound).all()
    assert (got[:, size:] == 0).all()


def batch(width, dtype=torch.float32, rows=(2, 3), scale=4.0):
    torch.manual_seed(width)
    x = (torch.randn(*rows, width) * scale).to(dtype)
    targets = torch.randint(width, (rows[0] * rows[1],))
    return x, targets, torch.randn(targets.shape)


# One element, less than a vector, tails, one vector per thread, several turns of the unrolled loop, and two
# blocks' widths.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 8, 37, 1029, 4100, 9001])
@pytest.mark.parametrize("options", [{}, dict(smoothing=SMOOTHING, z=Z)], ids=["plain", "smoothed, z"])
def test_kernels_match_fp64(kernels, dtype, width, options):
    x, targets, dlogps = batch(width, dtype)
    run = Run(kernels, x, targets, dlogps=dlogps, metrics=bool(options), **options)
    check(run, x, targets, dlogps, **options)


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("size", [1600, 1203, 390])
def test_shards_join_to_the_whole(kernels, shards, size):
    """Padded vocabularies too: with 390 tokens of 1600 the last shards have none."""
    x, targets, dlogps = batch(1600)
    targets = targets % size
    options = dict(smoothing=SMOOTHING, z=Z)
    run = Run(kernels, x, targets, dlogps=dlogps, size=size, shards=shards, metrics=True, **options)
    check(run, x, targets, dlogps, size, **options)
    whole = Run(kernels, x, targets, dlogps=dlogps, size=size, metrics=True, **options)
    assert torch.equal(run.hit, whole.hit)


def test_masked_tokens_are_not_read(kernels):
    x, targets, dlogps = batch(300)
    mask = torch.tensor([True, False, True, True, False, True])
    x.flatten(0, 1)[~mask] = float("nan")
    targets[2], targets[1] = -100, 10_000
    for shards in (1, 2):
        run = Run(kernels, x, targets, mask=mask, dlogps=dlogps, shards=shards, metrics=True)
        counted = mask & (targets != -100)
        assert (run.logps[~counted] == 0).all() and (run.dx.flatten(0, 1)[~counted] == 0).all()
        clean = x.where(mask.view(2, 3, 1), 0)
        check(run, clean, targets, dlogps, mask=mask)


def test_a_target_out_of_range_shows_as_nan(kernels):
    x, targets, dlogps = batch(64)
    targets[1], targets[4] = 64, -1
    for shards in (1, 2):
        run = Run(kernels, x, targets, dlogps=dlogps, shards=shards)
        wrong = torch.tensor([False, True, False, False, True, False])
        assert torch.equal(run.logps.isnan(), wrong)
        assert torch.equal(run.dx.flatten(0, 1).isnan().all(-1), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinities(kernels, dtype):
    x, targets, dlogps = batch(520, dtype)
    x[..., ::3] = float("-inf")
    targets = targets // 3 * 3 + 1
    targets[targets >= 520] = 1
    for shards in (1, 4):
        check(Run(kernels, x, targets, dlogps=dlogps, shards=shards, metrics=True), x, targets, dlogps)
    x[0, 0] = float("-inf")
    x[0, 1, 7], x[1, 2, 9] = float("inf"), float("nan")
    for shards in (1, 4):
        run = Run(kernels, x, targets, dlogps=dlogps, shards=shards)
        assert torch.equal(run.logps.isnan(), torch.tensor([True, True, False, False, False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_misaligned_rows(kernels, dtype):
    x, targets, dlogps = batch(203, dtype)
    options = dict(dlogps=dlogps, metrics=True)
    views = {
        "transposed": x.clone().transpose(0, 1).contiguous().transpose(0, 1),
        "part of each row": torch.cat([x, x], -1)[..., :203],
        "misaligned start": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }
    for name, view in views.items():
        assert torch.equal(view, x), name
        check(Run(kernels, view, targets, **options), x, targets, dlogps)
        check(Run(kernels, view, targets, inplace=True, **options), x, targets, dlogps)
    # The gradient at another distance from a 16-byte boundary than the logits: element by element.
    check(Run(kernels, x, targets, out_shift=1, **options), x, targets, dlogps)


def test_order_of_threads_and_blocks_does_not_matter(kernels):
    x, targets, dlogps = batch(2050, torch.bfloat16)
    runs = [
        Run(kernels, x, targets, dlogps=dlogps, metrics=True, inplace=True, seed=seed, grid=grid)
        for seed, grid in ((0, 2), (1, 2), (2, 5), (3, 64))
    ]
    for other in runs[1:]:
        for name in ("logps", "saved", "entropy", "hit", "dx"):
            assert torch.equal(getattr(runs[0], name), getattr(other, name))
