"""The loss of preference pairs from token log-probs: DPO and its relatives.

    a, b = Σ w·(logp − ref) over the chosen, the rejected response     log-ratios; w: mask, ref: reference
    lₚ   = variant(a, b)                                               one per pair, see VARIANTS
    loss = mean over pairs of lₚ  [+ rpo_alpha · nll]                  nll: of chosen responses, per token
    d loss / d logpₜ = wₜ · (d loss / d a, or d b)                     coefficients, saved for the backward

Sequences are packed: `cu_seqlens` int32 [2·pairs + 1] holds where each begins, and the end of the last.

    logps   [ chosen 0 | rejected 0 | chosen 1 | rejected 1 | ... | padding ]
             0          cu[1]        cu[2]      cu[3]              cu[-1]    T

Sums are fp64, logps fp32: a response of 4000 tokens sums to thousands, of which the loss sees differences
of hundredths. Definitions are those of TRL's DPOTrainer. Source: Rafailov et al., "Direct Preference
Optimization" (arXiv 2305.18290), and the papers named at each variant.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from solar_mega.ops import library

# ---------------------------------------------------------------------------------------------- variants


class PairTerms(NamedTuple):
    """What a variant sees; fp64 tensors [pairs] and numbers."""

    a: Tensor
    """Log-ratio of the chosen response: Σ (logp − ref)."""
    b: Tensor
    """Log-ratio of the rejected response."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float
    label_smoothing: float

    @property
    def h(self) -> Tensor:
        """β·(a − b), the margin of the implicit rewards."""
        return self.beta * (self.a - self.b)


def sigmoid(t: PairTerms) -> Tensor:
    """−(1−ε)·log σ(h) − ε·log σ(−h), h = β(a−b).

    DPO: Rafailov et al., arXiv 2305.18290, eq. 7. With label smoothing ε > 0, conservative DPO: Mitchell,
    "A note on DPO with noisy preferences" (2023).
    """
    return -(1 - t.label_smoothing) * logsigmoid(t.h) - t.label_smoothing * logsigmoid(-t.h)


def robust(t: PairTerms) -> Tensor:
    """[−(1−ε)·log σ(h) + ε·log σ(−h)] / (1−2ε), h = β(a−b).

    Robust DPO, unbiased when a fraction ε of the preferences is flipped: Ray Chowdhury et al., arXiv
    2403.00409. ε is `label_smoothing`.
    """
    eps = t.label_smoothing
    return (-(1 - eps) * logsigmoid(t.h) + eps * logsigmoid(-t.h)) / (1 - 2 * eps)


def hinge(t: PairTerms) -> Tensor:
    """max(0, 1 − h), h = β(a−b).

    SLiC-HF's hinge on the normalised likelihood: Zhao et al., arXiv 2305.10425; as a DPO loss: RSO, Liu et
    al., arXiv 2309.06657. The slope at h = 1 is 0.
    """
    return torch.relu(1 - t.h)


def ipo(t: PairTerms) -> Tensor:
    """(a/|chosen| − b/|rejected| − 1/(2β))².

    IPO: Azar et al., arXiv 2310.12036, eq. 17, β being the paper's τ; on averages over counted tokens, which
    its authors confirmed to TRL as what the paper ran.
    """
    mean = t.a / t.chosen_tokens.clamp(min=1) - t.b / t.rejected_tokens.clamp(min=1)
    return (mean - 1 / (2 * t.beta)).square()


def apo_zero(t: PairTerms) -> Tensor:
    """1 − σ(βa) + σ(βb): chosen up, rejected down.

    APO-zero, for chosen responses better than the model's own: D'Oosterlinck et al., arXiv 2408.06266, eq. 7.
    """
    return torch.sigmoid(-t.beta * t.a) + torch.sigmoid(t.beta * t.b)


def apo_down(t: PairTerms) -> Tensor:
    """σ(βa) + 1 − σ(h), h = β(a−b): chosen down, rejected further down.

    APO-down, for chosen responses worse than the model's own: D'Oosterlinck et al., arXiv 2408.06266, eq. 8.
    """
    return torch.sigmoid(t.beta * t.a) + torch.sigmoid(-t.h)


def sppo_hard(t: PairTerms) -> Tensor:
    """(a − 1/(2β))² + (b + 1/(2β))².

    SPPO with hard labels: Wu et al., arXiv 2405.00675, eq. 4.7 with P = 1 for the winner and 0 for the loser.
    """
    return (t.a - 0.5 / t.beta).square() + (t.b + 0.5 / t.beta).square()


def nca_pair(t: PairTerms) -> Tensor:
    """−log σ(βa) − ½·log σ(−βa) − ½·log σ(−βb).

    Pairwise NCA: Chen et al., arXiv 2402.05369, for two responses.
    """
    up, down = t.beta * t.a, t.beta * t.b
    return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)


VARIANTS: dict[str, Callable[[PairTerms], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
}
"""Name -> loss per pair [pairs]; csrc/common/dpo_formula.h has the same with their derivatives."""

Variant = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sppo_hard", "nca_pair"]
RpoMean = Literal["tokens", "sequences"]
Implementation = Literal["fused", "reference"]


class DPOLoss(NamedTuple):
    """What `dpo_loss` returns; all but `loss` without gradient. P pairs, sequences as in `cu_seqlens`."""

    loss: Tensor
    """[] mean over the pairs, with rpo_alpha · nll. Times P it is the sum to add up over micro-batches."""
    nll: Tensor
    """[] negative log-likelihood of the chosen responses per token, also when rpo_alpha is 0."""
    losses: Tensor
    """[P] without the nll term."""
    chosen_rewards: Tensor
    """[P] β·a, also for the variants on averages."""
    rejected_rewards: Tensor
    """[P] β·b."""
    margins: Tensor
    """[P] β·(a − b)."""
    accuracies: Tensor
    """[P] 1 where a > b, else 0 (a tie is 0)."""
    sums: Tensor
    """[2P] fp64, Σ w·logp per sequence. In a run without gradient, the `reference_logps` of a later call."""
    counts: Tensor
    """[2P] Σ w, the counted tokens per sequence."""


# ---------------------------------------------------------------------------------------------- reference


def dpo_loss_reference(
    logps: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    reference_logps: Tensor | None = None,
    reference_token_logps: Tensor | None = None,
    variant: Variant = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    rpo_mean: RpoMean = "tokens",
) -> DPOLoss:
    """The formula in PyTorch, in fp64; any floating dtype of logps, gradient by autograd."""
    _check_options(variant, beta, label_smoothing, rpo_alpha, rpo_mean)
    _check_reference(logps, cu_seqlens, mask, reference_logps, reference_token_logps)
    sequences = cu_seqlens.numel() - 1
    token = torch.arange(logps.numel(), device=logps.device)
    home = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)  # tokens after the end: `sequences`
    weight = torch.ones_like(logps, dtype=torch.float64) if mask is None else mask.double()

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(sequences + 1, dtype=torch.float64, device=logps.device)
        return sums.index_add(0, home, values)[:sequences]

    def weighted(values: Tensor) -> Tensor:
        return total(torch.where(weight != 0, values.double(), 0.0) * weight)

    sums, counts = weighted(logps), total(weight)
    ratio = sums
    if reference_logps is not None:
        ratio = sums - reference_logps.double()
    elif reference_token_logps is not None:
        ratio = sums - weighted(reference_token_logps)
    terms = PairTerms(ratio[0::2], ratio[1::2], counts[0::2], counts[1::2], beta, label_smoothing)
    losses, nll = VARIANTS[variant](terms), _nll(sums[0::2], counts[0::2], rpo_mean)
    loss = losses.mean() + rpo_alpha * nll if rpo_alpha else losses.mean()
    margins = terms.h.detach()
    rest = (losses, beta * terms.a, beta * terms.b, margins, margins > 0)
    rest = [t.detach().to(logps.dtype) for t in rest]
    return DPOLoss(
        loss.to(logps.dtype), nll.detach().to(logps.dtype), *rest, sums.detach(), counts.to(logps.dtype)
    )


def _nll(sums: Tensor, counts: Tensor, rpo_mean: str) -> Tensor:
    """A response without counted tokens has none."""
    if rpo_mean == "sequences":
        return -torch.where(counts > 0, sums / counts.clamp(min=1e-300), 0.0).mean()
    return -torch.where(counts.sum() > 0, sums.sum() / counts.sum().clamp(min=1e-300), 0.0)


def _check_options(
    variant: str, beta: float, label_smoothing: float, rpo_alpha: float, rpo_mean: str
) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"dpo_loss: variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    if rpo_mean not in ("tokens", "sequences"):
        raise ValueError(f'dpo_loss: rpo_mean is {rpo_mean!r}; allowed: "tokens", "sequences"')
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"dpo_loss: beta is {beta}; allowed: a finite number > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"dpo_loss: label_smoothing is {label_smoothing}; allowed: 0 <= label_smoothing < 0.5"
        )
    if label_smoothing and variant not in ("sigmoid", "robust"):
        raise ValueError(
            f"dpo_loss: label_smoothing is {label_smoothing} but variant {variant!r} has none; "
            "allowed: 0, or variant sigmoid or robust"
        )
    if not (math.isfinite(rpo_alpha) and rpo_alpha >= 0):
        raise ValueError(f"dpo_loss: rpo_alpha is {rpo_alpha}; allowed: a finite number >= 0")


def _check_reference(
    logps: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    reference_logps: Tensor | None,
    reference_token_logps: Tensor | None,
) -> None:
    # The compiled op checks the same in C++ (csrc/common/dpo_loss.h); here broadcasting would hide mistakes.
    if logps.dim() != 1 or not logps.is_floating_point():
        raise RuntimeError(f"dpo_loss: logps is {logps.dtype} {list(logps.shape)}; allowed: floats [tokens]")
    if cu_seqlens.dtype != torch.int32:
        raise RuntimeError(f"dpo_loss: cu_seqlens has dtype {cu_seqlens.dtype}; it must be torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 3 or cu_seqlens.numel() % 2 == 0:
        raise RuntimeError(
            f"dpo_loss: cu_seqlens has shape {list(cu_seqlens.shape)}; allowed: "
            "[2 * pairs + 1] with at least one pair"
        )
    if reference_logps is not None and reference_token_logps is not None:
        raise RuntimeError("dpo_loss: reference_logps and reference_token_logps are both given; allowed: one")
    wanted = {
        "mask": (mask, logps.numel()),
        "reference_logps": (reference_logps, cu_seqlens.numel() - 1),
        "reference_token_logps": (reference_token_logps, logps.numel()),
    }
    for name, (tensor, size) in wanted.items():
        if tensor is not None and tensor.shape != (size,):
            raise RuntimeError(f"dpo_loss: {name} has shape {list(tensor.shape)}; it must be [{size}]")
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > logps.numel():
            raise RuntimeError(
                f"dpo_loss: cu_seqlens goes {ends}; it must start at 0, not decrease, and end at most at "
                f"{logps.numel()}, the tokens of logps"
            )


# ---------------------------------------------------------------------------------------------- op

if library.available():
    _op = torch.ops.solar_mega.dpo_loss.default

    @torch.library.register_fake("solar_mega::dpo_loss")
    def _(
        logps: Tensor,
        cu_seqlens: Tensor,
        mask: Tensor | None = None,
        reference_logps: Tensor | None = None,
        reference_token_logps: Tensor | None = None,
        variant: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        rpo_alpha: float = 0.0,
        rpo_per_sequence: bool = False,
    ) -> tuple[Tensor, ...]:
        sequences = cu_seqlens.shape[0] - 1
        sums = logps.new_empty(sequences, dtype=torch.float64)
        per_pair, counts = logps.new_empty(5, sequences // 2), logps.new_empty(sequences)
        return logps.new_empty(()), logps.new_empty(()), per_pair, sums, counts, logps.new_empty(logps.shape)


# ---------------------------------------------------------------------------------------------- autograd
#
# Twice, as in rms_norm.py: for torch.ops and torch.compile, and without the generic wrapper in eager mode.


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (coefficients,) = ctx.saved_tensors
    return (None if grad is None else grad * coefficients, *[None] * 9)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


if library.available():
    torch.library.register_autograd("solar_mega::dpo_loss", _backward, setup_context=_setup)


class _DPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = _op(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


# ---------------------------------------------------------------------------------------------- public


def dpo_loss(
    logps: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    reference_logps: Tensor | None = None,
    reference_token_logps: Tensor | None = None,
    variant: Variant = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    rpo_mean: RpoMean = "tokens",
    implementation: Implementation = "fused",
) -> DPOLoss:
    """Loss, rewards and the gradient's coefficients of packed preference pairs, in one pass.

    logps: float32 [T], log-probs of the tokens; differentiable once, through `loss`.
    cu_seqlens: int32 [2P + 1]; sequence 2i is the chosen and 2i + 1 the rejected response of pair i. Starts
    at 0, never decreases, ends at most at T; tokens after the end are padding.
    mask: bool or float32 [T], the tokens that count, usually those of the response (as weights ≥ 0; default
    all). What does not count may be NaN.
    reference_logps: float64 or float32 [2P], the reference model's Σ w·logp per sequence (`DPOLoss.sums` of a
    call on its log-probs); or reference_token_logps: float32 [T]. With neither, the loss is reference-free.
    variant: one of VARIANTS, each with formula and paper. beta: β > 0. label_smoothing: ε of sigmoid and
    robust, 0 ≤ ε < 0.5.
    rpo_alpha: ≥ 0, the weight of the SFT term: the negative log-likelihood of the chosen responses, as a mean
    over all chosen tokens of the call (`rpo_mean` "tokens", as TRL does) or over responses of their own means
    ("sequences", the same however pairs are split over micro-batches: Pang et al., "Iterative Reasoning
    Preference Optimization", arXiv 2404.19733, eq. 1).

    Raises RuntimeError for a wrong dtype, device, shape or stride and, on CPU, for wrong offsets; ValueError
    for wrong options. On CUDA the offsets are not waited for: where they are wrong, the loss is NaN.
    """
    _check_options(variant, beta, label_smoothing, rpo_alpha, rpo_mean)
    tensors = (logps, cu_seqlens, mask, reference_logps, reference_token_logps)
    if not library.use_compiled(implementation, logps.device.type):
        return dpo_loss_reference(*tensors, variant, beta, label_smoothing, rpo_alpha, rpo_mean)
    call = _op if torch.compiler.is_compiling() else _DPOLoss.apply
    output = call(*tensors, variant, beta, label_smoothing, rpo_alpha, rpo_mean == "sequences")
    loss, nll, per_pair, sums, counts, _ = output
    return DPOLoss(loss, nll, *per_pair.unbind(0), sums, counts)
