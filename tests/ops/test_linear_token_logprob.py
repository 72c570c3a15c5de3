"""Token log-probs straight from hidden states: both ways to the gradient, in pieces and over ranks."""

import functools

import pytest
import torch

from solar_mega import ops
from solar_mega.bench import measure
from solar_mega.ops import linear_by_tokens, pieces
from solar_mega.ops.pieces import WideSum, pieces_of
from tests.distributed import run_ranks
from tests.ops.devices import DEVICES
from tests.ops.multiplications import Multiplications

SMOOTHED = dict(label_smoothing=0.1, z_loss=1e-3)
WAYS = ["columns", "tokens"]


def inputs(dtype, device="cpu", tokens=(5, 33), hidden=64, vocab=1003, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, hidden, generator=random)
    weight = torch.randn(vocab, hidden, generator=random) * 0.3
    targets = torch.randint(vocab, tokens, generator=random)
    dlogps = torch.randn(tokens, generator=random)
    return x.to(device, dtype), weight.to(device, dtype), targets.to(device), dlogps.to(device)


def run(function, x, weight, targets, dlogps, factor=1.0, **options):
    """(logps, dhidden, dweight) for the gradient factor * dlogps."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    logps = function(*leaves, targets, **options)
    gradients = torch.autograd.grad((logps * dlogps.to(logps.dtype)).sum() * factor, leaves)
    return logps.detach(), *gradients


def weights_for(way, dlogps):
    return {"token_weights": dlogps} if way == "tokens" else {}


# Of bf16 on a CPU: as on processors that multiply bf16 matrices faster, or fp32 ones.
PRODUCTS = {"fp32": torch.float32, "bf16, products in bf16": torch.bfloat16, "bf16, in fp32": torch.bfloat16}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 78 rows of the head, and any piece of tokens is large enough."""
    for module in (pieces, linear_by_tokens):
        monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(linear_by_tokens, "FEWEST", 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", [1, 20_000, 2**30], ids=["least", "several", "one piece"])
@pytest.mark.parametrize("options", [{}, SMOOTHED], ids=["plain", "smoothed, z"])
def test_errs_no_more_than_all_logits_at_once(
    device, products, way, limit, options, small_blocks, monkeypatch
):
    """Against fp64, at most twice the error of the same matmuls around the formula with all logits in
    memory."""
    monkeypatch.setattr(pieces, "products_in_fp32", lambda: products.endswith("in fp32"))
    x, weight, targets, dlogps = inputs(PRODUCTS[products], device)
    targets[1, 3], mask = -100, dlogps > -1.5
    options = dict(mask=mask, vocab_size=1000, **options)
    targets = targets.clamp(max=999)
    exact = run(
        ops.linear_token_logprob_reference, x.double(), weight.double(), targets, dlogps, 0.5, **options
    )
    rough = run(ops.linear_token_logprob_reference, x, weight, targets, dlogps, 0.5, **options)
    if way == "tokens" and x.element_size() == 2:
        limit += 16 * 1003 * 4 + 2 * 64 * (1003 + 165) + 20_000  # 16 tokens' logits, fp32 sums, one block
    given = dict(max_logits_bytes=limit, **weights_for(way, dlogps))
    with Multiplications() as multiplications:
        got = run(ops.linear_token_logprob, x, weight, targets, dlogps, 0.5, **given, **options)
    assert round(multiplications.total / (165 * 64 * 1003)) == (3 if way == "tokens" else 4)
    for name, value, want, formula in zip(("logps", "dhidden", "dweight"), got, exact, rough, strict=True):
        error, allowed = (value.double() - want).abs(), (formula.double() - want).abs()
        slack = torch.finfo(value.dtype).eps / 2 * want.abs().max()
        assert error.max() <= 2 * allowed.max() + slack, f"{name}: {error.max():.3g} vs {allowed.max():.3g}"
        assert error.mean() <= 2 * allowed.mean() + slack / 16, name


@pytest.mark.parametrize("in_fp32", [False, True], ids=["products in bf16", "in fp32"])
@pytest.mark.parametrize("way, mib", [("columns", 2), ("tokens", 4), ("tokens", 8)])
def test_memory_beside_the_gradients_keeps_within_the_limit(way, mib, in_fp32, monkeypatch):
    """On a CPU, in bf16: all the allocator sees in forward and backward, where all logits in fp32 would be
    48 MiB. Beside the pieces there may be hidden and its gradient in fp32, and a block of a product."""
    monkeypatch.setattr(pieces, "products_in_fp32", lambda: in_fp32)
    x, weight, targets, dlogps = inputs(torch.bfloat16, tokens=(1536,), hidden=128, vocab=8192)
    options = dict(max_logits_bytes=mib * 2**20, **weights_for(way, dlogps))
    for module in (pieces, linear_by_tokens):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(linear_by_tokens, "FEWEST", 16)
    with Multiplications() as multiplications:
        run(ops.linear_token_logprob, x, weight, targets, dlogps, **options)
    assert multiplications.total == (3 if way == "tokens" else 4) * 1536 * 128 * 8192
    beside = 2 * x.numel() * 4 + 2**18 + 40 * 4 * 1536
    call = functools.partial(run, ops.linear_token_logprob, x, weight, targets, dlogps, **options)
    peak = measure.extra_memory(call, torch.device("cpu"))
    assert peak <= x.nbytes * 2 + weight.nbytes * 2 + mib * 2**20 + beside  # the leaves are copies


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_wide_sum_is_rounded_in_its_own_memory(rows, factor, small_blocks):
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, rows, 9, generator=random), torch.randn(2, 9, 1200, generator=random)
    total = WideSum(torch.empty(rows, 1200, dtype=torch.bfloat16), torch.float32)
    for number in range(2):
        for start in range(0, rows, 3):
            block = slice(start, min(start + 3, rows))
            total.multiply(block, a[number, block], b[number], add=number > 0)
    exact = (a.double() @ b.double()).sum(0) * (factor or 1)
    got = total.rounded(None if factor is None else torch.tensor(factor))
    assert got.dtype == torch.bfloat16 and got.untyped_storage().nbytes() == rows * 1200 * 2
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


def test_pieces_cover_everything_once_within_the_limit():
    for count in (1, 15, 16, 17, 1000, 32_000):
        for limit in (1, 10_000, 10**6, 10**9):
            cut = pieces_of(count, 100, limit, 16)
            assert [i for p in cut for i in range(p.start, p.stop)] == list(range(count))
            assert all((p.stop - p.start) * 100 <= max(limit, 1600) for p in cut)
    assert pieces_of(0, 100, 10, 16) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counting", [0, 1, 40, 164, 165])
def test_tokens_that_do_not_count_are_not_multiplied(way, counting):
    """And change nothing: the same as with all of them, whose log-probs are then taken as 0."""
    x, weight, targets, dlogps = inputs(torch.float32)
    mask = (torch.randperm(165, generator=torch.Generator().manual_seed(1)) < counting).view(5, 33)
    want = run(ops.linear_token_logprob_reference, x, weight, targets, dlogps, mask=mask)
    with Multiplications() as multiplications:
        got = run(ops.linear_token_logprob, x, weight, targets, dlogps, mask=mask, **weights_for(way, dlogps))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    multiplied = counting if 0 < counting <= 165 * 15 // 16 else 165
    products = 3 if way == "tokens" else 4
    assert multiplications.total == products * multiplied * 64 * 1003


@pytest.mark.parametrize("way", WAYS)
def test_logits_never_exceed_the_limit(way):
    """Every product of the forward and backward that has vocabulary columns, seen as it is computed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > 4 * 4096 * 8:
                    self.elements = max(self.elements, t.numel())
            return out

    x, weight, targets, dlogps = inputs(torch.float32, tokens=(2048,), hidden=8, vocab=4096)
    with Largest() as largest:
        run(
            ops.linear_token_logprob,
            x,
            weight,
            targets,
            dlogps,
            max_logits_bytes=2**20,
            **weights_for(way, dlogps),
        )
    assert 2**16 < largest.elements <= 2**18  # of 2^23


@pytest.mark.parametrize("way", WAYS)
def test_what_needs_no_gradient_gets_none(way):
    x, weight, targets, dlogps = inputs(torch.float32)
    want = run(ops.linear_token_logprob_reference, x, weight, targets, dlogps)
    for which in (0, 1):
        leaves = [x.clone(), weight.clone()]
        leaves[which].requires_grad_()
        logps = ops.linear_token_logprob(*leaves, targets, **weights_for(way, dlogps))
        (logps * dlogps).sum().backward()
        torch.testing.assert_close(leaves[which].grad, want[1 + which], rtol=1e-4, atol=1e-5)
        assert leaves[1 - which].grad is None
    with torch.no_grad():
        logps = ops.linear_token_logprob(x, weight, targets, **weights_for(way, dlogps))
    torch.testing.assert_close(logps, want[0], rtol=1e-5, atol=1e-5)


def test_a_broken_promise_shows_in_every_gradient():
    x, weight, targets, dlogps = inputs(torch.float32)
    other = dlogps.clone()
    other[2, 7] += 0.01
    _, dhidden, dweight = run(ops.linear_token_logprob, x, weight, targets, other, token_weights=dlogps)
    assert dhidden.isnan().all() and dweight.isnan().all()


def test_the_promise_is_checked_without_waiting_for_a_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    weights = torch.randn(7)
    with NoReading():
        factors = [linear_by_tokens._common_factor(c * weights, weights) for c in (0.0, -3.0)]
    assert all(f.dim() == 0 for f in factors)
    assert [f.item() for f in factors] == pytest.approx([0, -3], rel=1e-6)  # rounded twice


@pytest.mark.parametrize("factor", [1.0, -1.0, 1024.0, 1e-12, 0.0])
def test_any_factor_keeps_the_promise(factor):
    x, weight, targets, dlogps = inputs(torch.float32)
    got = run(ops.linear_token_logprob, x, weight, targets, dlogps, factor, token_weights=dlogps)
    want = run(ops.linear_token_logprob, x, weight, targets, dlogps, factor)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(abs(factor), 1e-30))


def test_weights_of_zero_give_gradients_of_zero():
    x, weight, targets, dlogps = inputs(torch.float32)
    nothing = torch.zeros_like(dlogps)
    _, dhidden, dweight = run(ops.linear_token_logprob, x, weight, targets, nothing, token_weights=nothing)
    assert (dhidden == 0).all() and (dweight == 0).all()


def test_a_second_backward_is_refused_only_with_weights():
    x, weight, targets, dlogps = inputs(torch.float32)
    x.requires_grad_()
    logps = ops.linear_token_logprob(x, weight, targets)
    first, second = (torch.autograd.grad(logps.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    logps = ops.linear_token_logprob(x, weight, targets, token_weights=torch.ones_like(dlogps))
    torch.autograd.grad(logps.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward.*call it without token_weights"):
        torch.autograd.grad(logps.sum(), x)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_agree_to_the_bit_and_recomputation_too(way):
    tensors = inputs(torch.bfloat16)
    options = dict(max_logits_bytes=50_000, **weights_for(way, tensors[3]))
    first, second = (run(ops.linear_token_logprob, *tensors, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def recomputed(*args, **kwargs):
        return torch.utils.checkpoint.checkpoint(
            ops.linear_token_logprob, *args, use_reentrant=False, **kwargs
        )

    again = run(recomputed, *tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_accumulates_into_a_main_gradient_through_a_hook(way):
    """As Megatron's data parallelism has it: a hook after accumulation moves .grad into an fp32 buffer. The
    weight is an embedding too, so both uses must add up before."""
    x, weight, targets, dlogps = inputs(torch.float32)
    weight = torch.nn.Parameter(weight)
    main_grad, calls = torch.zeros(weight.shape), []

    def move(parameter):
        main_grad.add_(parameter.grad)
        parameter.grad = None
        calls.append(1)

    weight.register_post_accumulate_grad_hook(move)
    for _ in range(2):
        states = x + torch.nn.functional.embedding(targets, weight)
        logps = ops.linear_token_logprob(states, weight, targets, **weights_for(way, dlogps))
        (logps * dlogps).sum().backward()
    leaf = weight.detach().clone().requires_grad_()
    states = x + torch.nn.functional.embedding(targets, leaf)
    (ops.linear_token_logprob_reference(states, leaf, targets) * dlogps).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(main_grad, 2 * leaf.grad, rtol=1e-4, atol=2e-5)


def test_strided_hidden_states_and_empty_batches():
    x, weight, targets, dlogps = inputs(torch.float32)
    want = run(ops.linear_token_logprob, x, weight, targets, dlogps)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, targets, dlogps)]
    got = run(ops.linear_token_logprob, turned[0], weight, *turned[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for options in ({}, dict(token_weights=dlogps[:0])):
        logps, dhidden, dweight = run(
            ops.linear_token_logprob, x[:0], weight, targets[:0], dlogps[:0], **options
        )
        assert logps.shape == (0, 33) and dhidden.shape == (0, 33, 64) and (dweight == 0).all()


BAD = {
    "dtype of weight": (
        dict(weight=torch.zeros(9, 8).bfloat16()),
        "weight is torch.bfloat16 on cpu; it must be torch.float32 on cpu",
    ),
    "shape of weight": (
        dict(weight=torch.zeros(9, 7)),
        r"weight has shape \[9, 7\]; it must be \[columns, 8\]",
    ),
    "shape of hidden": (
        dict(hidden=torch.zeros(8)),
        r"hidden is torch.float32 of shape \[8\]; allowed: .*\[..., h\]",
    ),
    "shape of targets": (
        dict(targets=torch.zeros(3, 2, dtype=torch.int64)),
        r"targets has shape \[3, 2\]; it must be \[2, 3\]",
    ),
    "dtype of targets": (
        dict(targets=torch.zeros(2, 3)),
        "targets is torch.float32 on cpu; it must be torch.int64",
    ),
    "target": (dict(targets=torch.full((2, 3), 9)), "targets has 9 at position 0; allowed: 0 to 8, or -100"),
    "mask": (dict(mask=torch.zeros(2, 3)), "mask is torch.float32 on cpu; it must be torch.bool on cpu"),
    "weights": (dict(token_weights=torch.zeros(2)), r"token_weights has shape \[2\]; it must be \[2, 3\]"),
    "vocabulary": (dict(vocab_size=10), "vocab_size is 10; allowed: 1 to 9, the rows of all ranks' weight"),
    "limit": (dict(max_logits_bytes=0), "max_logits_bytes is 0; allowed: a positive number of bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    change, message = BAD[name]
    good = dict(
        hidden=torch.zeros(2, 3, 8),
        weight=torch.zeros(9, 8),
        targets=torch.zeros(2, 3, dtype=torch.int64),
    )
    with pytest.raises(RuntimeError, match=message):
        ops.linear_token_logprob(**{**good, **change})


# ---------------------------------------------------------------------------------------------- ranks

CASES = {
    "columns": dict(),
    "columns, pieces": dict(max_logits_bytes=4000),
    "tokens, pieces": dict(token_weights=True, max_logits_bytes=20_000),
    "columns, sequence parallel": dict(sequence_parallel=True),
    "tokens, sequence parallel": dict(sequence_parallel=True, token_weights=True, max_logits_bytes=20_000),
    "padded": dict(vocab_size=900, token_weights=True, max_logits_bytes=20_000, **SMOOTHED),
}


def _split_over_ranks():
    """Each case's (logps, dhidden, dweight) of this rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, options in CASES.items():
        x, weight, targets, dlogps, options = _case(options)
        if options.get("sequence_parallel"):
            x = x.chunk(ranks)[rank]
        mine = weight.chunk(ranks)[rank]
        results[name] = run(
            ops.linear_token_logprob, x, mine, targets, dlogps, tp_group=dist.group.WORLD, **options
        )
    dist.destroy_process_group()
    return results


def _case(options):
    x, weight, targets, dlogps = inputs(torch.float32, tokens=(12, 5), vocab=1200)
    targets = targets % options.get("vocab_size", 1200)
    options = dict(options)
    if "token_weights" in options:
        options["token_weights"] = dlogps
    return x, weight, targets, dlogps, options


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one(ranks):
    by_rank = run_ranks(_split_over_ranks, ranks)
    for name, options in CASES.items():
        x, weight, targets, dlogps, options = _case(options)
        parallel = options.pop("sequence_parallel", False)
        want = run(ops.linear_token_logprob, x, weight, targets, dlogps, **options)
        logps, dhidden, dweight = zip(*(result[name] for result in by_rank), strict=True)
        assert all(torch.equal(logps[0], other) for other in logps)
        got = (logps[0], torch.cat(dhidden) if parallel else dhidden[0], torch.cat(dweight))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
