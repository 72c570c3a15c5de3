"""The preference loss against TRL's definitions in fp64, on every device that has the compiled op."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from solar_mega import ops
from solar_mega.ops.dpo_loss import VARIANTS, DPOLoss
from tests.ops.devices import DEVICES

SMOOTHED = ("sigmoid", "robust")

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def trl_losses(pi, ref, beta, eps, lengths):
    """TRL's DPOTrainer on per-sequence log-probs, chosen and rejected in turn: each variant's losses [pairs].

    Written out from its definitions (trl 0.24 and 1.16 agree on these), independently of the op's own.
    """
    chosen_logps, rejected_logps, ref_chosen, ref_rejected = pi[0::2], pi[1::2], ref[0::2], ref[1::2]
    a, b = chosen_logps - ref_chosen, rejected_logps - ref_rejected
    logits = (chosen_logps - rejected_logps) - (ref_chosen - ref_rejected)
    n = lengths.clamp(min=1.0)
    mean_logits = (chosen_logps / n[0::2] - rejected_logps / n[1::2]) - (
        ref_chosen / n[0::2] - ref_rejected / n[1::2]
    )
    clean, flipped = F.logsigmoid(beta * logits), F.logsigmoid(-beta * logits)
    return {
        "sigmoid": -clean * (1 - eps) - flipped * eps,
        "robust": (-clean * (1 - eps) + flipped * eps) / (1 - 2 * eps),
        "hinge": torch.relu(1 - beta * logits),
        "ipo": (mean_logits - 1 / (2 * beta)) ** 2,
        "apo_zero": (1 - F.sigmoid(beta * a)) + F.sigmoid(beta * b),
        "apo_down": F.sigmoid(beta * a) + (1 - F.sigmoid(beta * (a - b))),
        "sppo_hard": (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "nca_pair": -F.logsigmoid(beta * a) - 0.5 * F.logsigmoid(-beta * a) - 0.5 * F.logsigmoid(-beta * b),
    }


def batch(lengths, device="cpu", padding=3, scale=4.0, seed=0, kept=0.8):
    """logps, cu_seqlens, mask, token reference; NaN wherever the mask is off."""
    random = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = int(ends[-1]) + padding
    logps, reference = (-scale * torch.rand(tokens, generator=random) for _ in range(2))
    mask = torch.rand(tokens, generator=random) < kept
    logps[~mask] = reference[~mask] = float("nan")
    return tuple(t.to(device) for t in (logps, ends, mask, reference))


def sums(values, cu_seqlens, mask):
    """Per sequence, in fp64, with a loop."""
    spans = zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)
    return torch.stack([values[i:j][mask[i:j]].double().sum() for i, j in spans])


LENGTHS = [5, 300, 0, 1, 131, 128, 7, 0, 640, 33]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("rpo_alpha", [0.0, 0.7])
def test_equals_trl(device, variant, beta, rpo_alpha):
    logps, cu_seqlens, mask, reference = batch(LENGTHS, device)
    eps = 0.15 if variant in SMOOTHED else 0.0
    leaf = logps.requires_grad_()
    got = ops.dpo_loss(
        leaf,
        cu_seqlens,
        mask=mask,
        reference_token_logps=reference,
        variant=variant,
        beta=beta,
        label_smoothing=eps,
        rpo_alpha=rpo_alpha,
    )
    (gradient,) = torch.autograd.grad(got.loss, leaf)

    exact = logps.detach().double().cpu().requires_grad_()
    mask = mask.cpu()
    pi, ref = sums(exact, cu_seqlens, mask), sums(reference.cpu(), cu_seqlens, mask)
    lengths = sums(torch.ones_like(exact), cu_seqlens, mask)
    losses = trl_losses(pi, ref, beta, eps, lengths)[variant]
    nll = -pi[0::2].sum() / lengths[0::2].sum()  # TRL: cross entropy over the batch's chosen tokens
    (losses.mean() + rpo_alpha * nll).backward()
    rewards = beta * (pi - ref)
    want = {
        "loss": losses.mean() + rpo_alpha * nll,
        "nll": nll,
        "losses": losses,
        "chosen_rewards": rewards[0::2],
        "rejected_rewards": rewards[1::2],
        "margins": rewards[0::2] - rewards[1::2],
        "accuracies": (rewards[0::2] > rewards[1::2]).double(),
        "sums": pi,
        "counts": lengths,
    }
    # fp64 inside: what remains is one rounding to fp32 (sums: fp64 noise of a few hundred terms).
    for name, value in got._asdict().items():
        torch.testing.assert_close(
            value.double().cpu(),
            want[name],
            rtol=2e-7,
            atol=1e-12,
            check_dtype=False,
            msg=lambda m, n=name: n + m,
        )
    wanted = torch.where(mask, exact.grad, 0.0)
    torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rpo_mean", ["tokens", "sequences"])
def test_fused_equals_reference(device, variant, rpo_mean):
    logps, cu_seqlens, mask, _ = batch(LENGTHS, device)
    mask = mask * torch.rand(mask.shape, device=device)  # weights
    ratio_free = {"variant": variant, "rpo_alpha": 0.3, "rpo_mean": rpo_mean}
    leaf = logps.requires_grad_()
    runs = []
    for implementation in ("fused", "reference"):
        got = ops.dpo_loss(leaf, cu_seqlens, mask=mask, implementation=implementation, **ratio_free)
        runs.append((*got, *torch.autograd.grad(got.loss, leaf)))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    variant=st.sampled_from(list(VARIANTS)),
    beta=st.floats(1e-3, 10),
    scale=st.sampled_from([1e-6, 1.0, 30.0]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_batch(lengths, variant, beta, scale, kept, seed):
    logps, cu_seqlens, mask, reference = batch([*lengths, *lengths[::-1]], scale=scale, seed=seed, kept=kept)
    leaf = logps.requires_grad_()
    arguments = {
        "mask": mask,
        "reference_token_logps": reference,
        "variant": variant,
        "beta": beta,
        "rpo_alpha": 1.0,
    }
    got = ops.dpo_loss(leaf, cu_seqlens, **arguments)
    want = ops.dpo_loss(leaf, cu_seqlens, **arguments, implementation="reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * scale * max(beta, 1))
    slope, exact = (torch.autograd.grad(o.loss, leaf)[0] for o in (got, want))
    torch.testing.assert_close(slope, exact, rtol=1e-5, atol=1e-7 * beta)


def test_gradcheck_of_the_reference():
    logps, cu_seqlens, mask, reference = batch([4, 3, 0, 5], scale=2.0)
    logps = logps.double().nan_to_num(0.0).requires_grad_()
    for variant in VARIANTS:
        for rpo_mean in ("tokens", "sequences"):

            def loss(x, variant=variant, rpo_mean=rpo_mean):
                return ops.dpo_loss_reference(
                    x, cu_seqlens, mask, None, reference, variant, 0.3, rpo_alpha=0.5, rpo_mean=rpo_mean
                ).loss

            assert torch.autograd.gradcheck(loss, (logps,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gap", [1e-4, 1.0, 50.0, 4000.0, -4000.0])
def test_extreme_margins_stay_finite_and_exact(device, variant, gap):
    """No overflow at margins of thousands, and the small losses of good pairs keep their digits."""
    logps = torch.tensor([gap, 0.0], device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    got = ops.dpo_loss(logps, cu_seqlens, variant=variant, beta=1.0)
    (slope,) = torch.autograd.grad(got.loss, logps)
    pi = torch.tensor([gap, 0.0], dtype=torch.float64).float().double().requires_grad_()
    want = trl_losses(pi, torch.zeros(2).double(), 1.0, 0.0, torch.ones(2).double())[variant].mean()
    (exact,) = torch.autograd.grad(want, pi)
    # 1 − σ loses what is below 1e-16, in the formula as TRL writes it.
    torch.testing.assert_close(got.loss.double().cpu(), want, rtol=2e-7, atol=2e-16)
    torch.testing.assert_close(slope.double().cpu(), exact, rtol=3e-7, atol=2e-16)


@pytest.mark.parametrize("device", DEVICES)
def test_policy_equal_to_reference_starts_at_ln_2_with_margin_0(device):
    """Exactly, at sums of thousands, through the cached sums as through token log-probs."""
    logps, cu_seqlens, mask, _ = batch([4096, 3000, 2000, 4096], device, scale=3.0)
    cached = ops.dpo_loss(logps, cu_seqlens, mask=mask).sums
    for reference in ({"reference_logps": cached}, {"reference_token_logps": logps}):
        got = ops.dpo_loss(logps, cu_seqlens, mask=mask, **reference)
        assert got.margins.abs().max() == 0 and got.accuracies.max() == 0
        assert got.loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_split_over_micro_batches_sums_to_the_whole():
    logps, cu_seqlens, mask, reference = batch(LENGTHS, padding=0)
    options = {"rpo_alpha": 0.5, "rpo_mean": "sequences"}
    whole = ops.dpo_loss(logps, cu_seqlens, mask=mask, reference_token_logps=reference, **options)
    total = 0.0
    for first, last in ((0, 4), (4, 10)):
        at = slice(int(cu_seqlens[first]), int(cu_seqlens[last]))
        ends = cu_seqlens[first : last + 1] - cu_seqlens[first]
        part = ops.dpo_loss(logps[at], ends, mask=mask[at], reference_token_logps=reference[at], **options)
        total += part.loss.item() * (last - first) / 2
    assert total / 5 == pytest.approx(whole.loss.item(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_are_equal_to_the_bit(device):
    logps, cu_seqlens, mask, reference = batch(LENGTHS * 9, device)
    leaf, threads = logps.requires_grad_(), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            got = ops.dpo_loss(leaf, cu_seqlens, mask=mask, reference_token_logps=reference, rpo_alpha=1.0)
            runs.append((*got, *torch.autograd.grad(got.loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_loss_is_differentiable_and_scales_its_gradient(device):
    logps, cu_seqlens, mask, _ = batch(LENGTHS, device)
    leaf = logps.requires_grad_()
    got = ops.dpo_loss(leaf, cu_seqlens, mask=mask)
    assert [name for name, value in got._asdict().items() if value.requires_grad] == ["loss"]
    once = torch.autograd.grad(got.loss, leaf, retain_graph=True)[0]
    thrice = torch.autograd.grad(got.loss * 3, leaf, retain_graph=True)[0]
    torch.testing.assert_close(thrice, 3 * once)
    squared = torch.autograd.grad(got.loss.square(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        squared.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    logps, cu_seqlens, mask, reference = batch([4, 3, 5, 2], device)
    logps, reference = logps.nan_to_num(), reference.nan_to_num()
    leaf, op = logps.clone().requires_grad_(), torch.ops.solar_mega.dpo_loss.default
    opcheck(op, (leaf, cu_seqlens))
    opcheck(op, (leaf, cu_seqlens, mask, None, reference, "robust", 0.2, 0.1, 0.5, True))
    opcheck(op, (leaf, cu_seqlens, mask.float(), torch.zeros(4, dtype=torch.float64, device=device)))


def test_compiles_into_one_graph():
    logps, cu_seqlens, mask, _ = batch(LENGTHS)
    logps = logps.nan_to_num()

    def step(x):
        return ops.dpo_loss(x * 2, cu_seqlens, mask=mask, variant="ipo").loss

    leaves = [logps.clone().requires_grad_() for _ in range(2)]
    step(leaves[0]).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


LOGPS, CU = torch.zeros(8), torch.tensor([0, 3, 8], dtype=torch.int32)
BAD_TENSORS = {
    "dtype of logps": ({"logps": LOGPS.bfloat16()}, "logps has dtype BFloat16; it must be Float"),
    "shape of logps": ({"logps": LOGPS[None]}, r"logps has shape \[1, 8\]; allowed: \[tokens\]"),
    "stride of logps": ({"logps": torch.zeros(16)[::2]}, "logps has stride 2; it must be contiguous"),
    "dtype of offsets": ({"cu_seqlens": CU.long()}, "cu_seqlens has dtype Long; it must be Int"),
    "no pair": ({"cu_seqlens": CU[:1]}, r"cu_seqlens has shape \[1\]; allowed: \[2 \* pairs \+ 1\]"),
    "half a pair": ({"cu_seqlens": CU[:2]}, "at least one pair, as sequence 2i is the chosen"),
    "first offset": ({"cu_seqlens": CU + 1}, "cu_seqlens starts at 1; it must start at 0"),
    "falling offsets": (
        {"cu_seqlens": torch.tensor([0, 5, 3], dtype=torch.int32)},
        "cu_seqlens falls from 5 to 3 at index 2",
    ),
    "last offset": ({"logps": LOGPS[:7]}, "cu_seqlens ends at 8; logps has 7 tokens"),
    "shape of mask": (
        {"mask": torch.ones(7).bool()},
        r"mask has shape \[7\]; it must be \[8\], one per token",
    ),
    "dtype of mask": ({"mask": torch.ones(8).long()}, "mask has dtype Long; allowed: Bool, Float"),
    "shape of reference": (
        {"reference_logps": torch.zeros(8)},
        r"reference_logps has shape \[8\]; it must be \[2\], one per sequence",
    ),
    "dtype of reference": (
        {"reference_logps": torch.zeros(2).half()},
        "has dtype Half; allowed: Float, Double",
    ),
    "token reference": (
        {"reference_token_logps": torch.zeros(2)},
        r"reference_token_logps has shape \[2\]; it must be \[8\], one per token",
    ),
    "two references": (
        {"reference_logps": torch.zeros(2), "reference_token_logps": LOGPS},
        "are both given; allowed: one of them, or none",
    ),
}
BAD_OPTIONS = {
    "variant": ({"variant": "kto"}, "variant is 'kto'; allowed: sigmoid, robust, hinge"),
    "beta": ({"beta": 0.0}, "beta is 0.0; allowed: a finite number > 0"),
    "smoothing": ({"label_smoothing": 0.5}, "label_smoothing is 0.5; allowed: 0 <= label_smoothing < 0.5"),
    "smoothed ipo": (
        {"label_smoothing": 0.1, "variant": "ipo"},
        "label_smoothing is 0.1 but variant 'ipo' has none",
    ),
    "alpha": ({"rpo_alpha": float("nan")}, "rpo_alpha is nan; allowed: a finite number >= 0"),
    "mean": ({"rpo_mean": "pairs"}, 'rpo_mean is \'pairs\'; allowed: "tokens", "sequences"'),
    "implementation": ({"implementation": "fast"}, "implementation is 'fast'"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name):
    bad, message = BAD_TENSORS[name]
    with pytest.raises(RuntimeError, match=f"^dpo_loss: .*{message}"):
        ops.dpo_loss(**({"logps": LOGPS, "cu_seqlens": CU} | bad))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused(name):
    bad, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        ops.dpo_loss(LOGPS, CU, **bad)


def test_the_op_itself_refuses_bad_options():
    op = torch.ops.solar_mega.dpo_loss
    for arguments, message in (
        (("kto",), "variant is 'kto'; allowed: sigmoid, "),
        (("ipo", 0.1, 0.2), "variant 'ipo' has none"),
        (("ipo", float("inf")), "beta is inf"),
        (("ipo", 0.1, 0.0, -1.0), "rpo_alpha is -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(LOGPS, CU, None, None, None, *arguments)


@pytest.mark.parametrize(
    "name",
    ["no pair", "first offset", "falling offsets", "last offset", "shape of mask", "shape of reference"],
)
def test_the_reference_refuses_what_broadcasting_would_hide(name):
    with pytest.raises(RuntimeError, match="^dpo_loss: (cu_seqlens|mask|reference_logps) "):
        ops.dpo_loss(
            **({"logps": LOGPS, "cu_seqlens": CU} | BAD_TENSORS[name][0]), implementation="reference"
        )


@pytest.mark.cuda
@pytest.mark.skipif(not (torch.cuda.is_available() and ops.available("cuda")), reason="no GPU")
def test_wrong_offsets_on_a_gpu_give_nan():
    cu_seqlens = torch.tensor([0, 5, 99], dtype=torch.int32, device="cuda")
    assert ops.dpo_loss(torch.zeros(8, device="cuda"), cu_seqlens).loss.isnan()


def test_every_variant_is_documented_with_its_paper():
    for name, function in VARIANTS.items():
        assert function.__name__ == name and ("arXiv" in function.__doc__), name
    assert DPOLoss._fields[0] == "loss"
