"""Log-probabilities of given tokens, from logits split over the vocabulary, without a softmax in memory.

    m = max_v x_v,  S = Σ_v exp(x_v − m),  lse = m + ln S          over the vocabulary, all shards
    logp = (1 − ε) x_t + (ε / V) Σ_v x_v − lse − z · lse²        label smoothing ε, z-loss z; both 0: ln p(t)
    entropy = ln S − Σ_v exp(x_v − m) (x_v − m) / S,   hit = (x_t = m)

    backward, with d the gradient of logp:
    dlogits_v = d [ (1 − ε) 1[v = t] + ε / V − (1 + 2 z lse) exp(x_v − m) / S ]

Shapes: logits [..., V/tp]; targets, mask, logp [...]. Every rank reduces its shard to three numbers per token
(m, S, x_t), one all-gather of these joins them, and every rank computes the same result to the bit. Saved are
m and S, fp32, apart: rounded into one lse, large logits would lose the gradient's digits. Arithmetic is fp32
for bf16, fp16 and fp32 logits; a bf16 log-softmax errs by up to 0.13 nats a token.
Sources: label smoothing Szegedy et al. (arXiv 1512.00567) eq. 6 as torch.nn.functional.cross_entropy has it;
z-loss PaLM (arXiv 2204.02311) §5; online softmax Milakov and Gimelshein (arXiv 1805.02867) alg. 3.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import library

IGNORE = -100
"""A target of this value does not count, whatever the mask: log-prob 0, gradient 0."""


class TokenMetrics(NamedTuple):
    """What `token_logprob_with_metrics` returns, each of the shape of targets."""

    logps: Tensor
    """fp32, differentiable."""
    entropy: Tensor
    """fp32, nats, of the distribution over the vocabulary; not differentiable."""
    hit: Tensor
    """bool: no token has a higher logit than the target."""


class Terms(NamedTuple):
    """What all ranks share; `size` tokens in all, `first` the global token of this rank's column 0."""

    first: int
    size: int
    smoothing: float
    z: float


# ---------------------------------------------------------------------------------------------- reference


def token_logprob_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The formula in PyTorch over a whole vocabulary: fp32 arithmetic (fp64 for fp64), any device."""
    _check(logits, targets, mask)
    size = logits.shape[-1] if vocab_size is None else vocab_size
    counted = counted_tokens(targets, mask)
    check_targets(targets, counted, size)
    x = _wide(logits[..., :size])
    lse = torch.logsumexp(x, -1)
    logps = x.gather(-1, targets.where(counted, 0)[..., None])[..., 0] - lse
    if label_smoothing:
        logps = (1 - label_smoothing) * logps + label_smoothing * (x.mean(-1) - lse)
    if z_loss:
        logps = logps - z_loss * lse.square()
    return logps.where(counted, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def counted_tokens(targets: Tensor, mask: Tensor | None) -> Tensor:
    counted = targets != IGNORE
    return counted if mask is None else counted & mask


def _check(logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    # The compiled ops check the same in C++ (csrc/common/token_logprob.h).
    if not logits.is_floating_point():
        raise RuntimeError(f"token_logprob: logits has dtype {logits.dtype}; allowed: a floating-point dtype")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise RuntimeError(
            f"token_logprob: logits has shape {list(logits.shape)}; allowed: [..., columns] with columns >= 1"
        )
    for name, tensor, dtype in (("targets", targets, torch.int64), ("mask", mask, torch.bool)):
        if tensor is None:
            continue
        if (tensor.dtype, tensor.device) != (dtype, logits.device):
            got, wanted = f"{tensor.dtype} on {tensor.device}", f"{dtype} on {logits.device}"
            raise RuntimeError(f"token_logprob: {name} is {got}; it must be {wanted}")
        if tensor.shape != logits.shape[:-1]:
            got, wanted = list(tensor.shape), list(logits.shape[:-1])
            raise RuntimeError(
                f"token_logprob: {name} has shape {got}; it must be {wanted}, one value per row of logits"
            )


def check_targets(targets: Tensor, counted: Tensor, size: int) -> None:
    if targets.device.type != "cpu":
        return  # looking would make the host wait
    wrong = counted & ((targets < 0) | (targets >= size))
    if wrong.any():
        position = int(wrong.flatten().nonzero()[0])
        got = int(targets.flatten()[position])
        raise RuntimeError(
            f"token_logprob: targets has {got} at position {position}; allowed: 0 to {size - 1}, "
            f"or {IGNORE} for a token that does not count"
        )


class _Reference:
    """The compiled ops in PyTorch, for machines without them: what is saved and joined is the same."""

    @staticmethod
    def partial(logits, targets, mask, first, size, smooth=False, entropy=False):
        _check(logits, targets, mask)
        counted = counted_tokens(targets, mask)
        check_targets(targets, counted, size)
        x = _wide(logits[..., : max(0, min(size - first, logits.shape[-1]))])
        if x.shape[-1] == 0:
            peak, x = x.new_full(x.shape[:-1], -torch.inf), x.new_full((*x.shape[:-1], 1), -torch.inf)
        else:
            peak = x.amax(-1)
        shifted = x - peak.where(peak != -torch.inf, 0)[..., None]
        weights = shifted.exp()
        column = targets - first
        here = (column >= 0) & (column < x.shape[-1])
        target = x.gather(-1, column.where(here, 0)[..., None])[..., 0].where(here, 0)
        stats = [peak, weights.sum(-1), target]
        stats += [x.sum(-1).where(peak != -torch.inf, 0)] if smooth else []
        stats += [(weights * shifted).where(weights != 0, 0).sum(-1)] if entropy else []
        return torch.stack([s.where(counted, 0) for s in stats])

    @staticmethod
    def combine(stats, size, smoothing=0.0, z=0.0, metrics=False):
        peak = stats[:, 0].amax(0)
        factor = (stats[:, 0] - peak).exp()
        total, target = (factor * stats[:, 1]).sum(0), stats[:, 2].sum(0)
        counted, log_total = total != 0, total.log()
        logps = (target - peak) - log_total
        if smoothing:
            logps = logps + smoothing * ((stats[:, 3].sum(0) / size - peak) - log_total - logps)
        if z:
            logps = logps - z * (peak + log_total).square()
        saved = torch.stack([peak, total])
        if not metrics:
            nothing = stats.new_empty(0)
            return logps.where(counted, 0), saved, nothing, nothing.bool()
        moved = (stats[:, 0] - peak) * stats[:, 1]
        spread = (factor * (stats[:, -1] + moved).where(stats[:, 1] != 0, 0)).sum(0)
        entropy = (log_total - spread / total).where(counted, 0)
        return logps.where(counted, 0), saved, entropy, (target >= peak) & counted

    @staticmethod
    def forward(logits, targets, mask, size, smoothing=0.0, z=0.0, metrics=False):
        stats = _Reference.partial(logits, targets, mask, 0, size, smoothing != 0, metrics)
        return _Reference.combine(stats[None], size, smoothing, z, metrics)

    @staticmethod
    def backward(dlogps, logits, targets, saved, first, size, smoothing=0.0, z=0.0):
        out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        valid = max(0, min(size - first, logits.shape[-1]))
        peak, total = saved
        d_lse = dlogps * (1 + 2 * z * (peak + total.log())) if z else dlogps
        dx = (
            dlogps[..., None] * (smoothing / size)
            - (d_lse / total)[..., None] * (_wide(logits[..., :valid]) - peak[..., None]).exp()
        )
        column = targets - first
        here = ((column >= 0) & (column < valid))[..., None]
        if valid:
            at_target = (dlogps * (1 - smoothing))[..., None].where(here, 0)
            dx.scatter_add_(-1, column[..., None].where(here, 0), at_target)
        out[..., :valid] = dx.where(((total != 0) & (dlogps != 0))[..., None], 0).to(out.dtype)
        return out

    @staticmethod
    def backward_(dlogps, logits, *rest):
        logits.copy_(_Reference.backward(dlogps, logits, *rest))


# ---------------------------------------------------------------------------------------------- op


class _Fused:
    """The compiled ops; csrc/registration.cpp has their schemas."""

    if library.available():
        partial = torch.ops.solar_mega.token_logprob_partial.default
        combine = torch.ops.solar_mega.token_logprob_combine.default
        forward = torch.ops.solar_mega.token_logprob.default
        backward = torch.ops.solar_mega.token_logprob_backward.default
        backward_ = torch.ops.solar_mega.token_logprob_backward_.default


if library.available():

    def _results(like: Tensor, shape: torch.Size, metrics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = shape if metrics else (0,)
        logps, saved = (like.new_empty(s, dtype=torch.float32) for s in (shape, (2, *shape)))
        entropy = like.new_empty(wanted, dtype=torch.float32)
        return logps, saved, entropy, like.new_empty(wanted, dtype=torch.bool)

    @torch.library.register_fake("solar_mega::token_logprob")
    def _(logits, targets, mask, vocab_size, label_smoothing=0.0, z_loss=0.0, metrics=False):
        return _results(logits, targets.shape, metrics)

    @torch.library.register_fake("solar_mega::token_logprob_partial")
    def _(logits, targets, mask, first_column, vocab_size, smooth=False, entropy=False):
        return logits.new_empty((3 + smooth + entropy, *targets.shape), dtype=torch.float32)

    @torch.library.register_fake("solar_mega::token_logprob_combine")
    def _(stats, vocab_size, label_smoothing=0.0, z_loss=0.0, metrics=False):
        return _results(stats, stats.shape[2:], metrics)

    @torch.library.register_fake("solar_mega::token_logprob_backward")
    def _(dlogps, logits, targets, saved, first_column, vocab_size, label_smoothing=0.0, z_loss=0.0):
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("solar_mega::token_logprob_backward_")
    def _(dlogps, logits, targets, saved, first_column, vocab_size, label_smoothing=0.0, z_loss=0.0):
        return None


# ---------------------------------------------------------------------------------------------- autograd


@once_differentiable
def _op_backward(ctx: Any, dlogps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dlogps is None:
        return (None,) * 7
    logits, targets, saved = ctx.saved_tensors
    return _Fused.backward(dlogps.contiguous(), logits, targets, saved, 0, *ctx.terms), *(None,) * 6


def _op_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, _, size, smoothing, z, _ = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.terms = (size, smoothing, z)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


if library.available():
    torch.library.register_autograd("solar_mega::token_logprob", _op_backward, setup_context=_op_setup)


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """[...] of every rank of the group -> [ranks, ...], in rank order."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    # Flat: gloo wants the ranks in an existing dimension, NCCL does not care.
    dist.all_gather_into_tensor(out.view(-1), tensor.view(-1), group=group)
    return out


def shards(group: Any) -> tuple[int, int]:
    """(ranks that share the vocabulary, number of this one)."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def evaluate(
    kernels: Any,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    terms: Terms,
    metrics: bool,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, saved, entropy, hit) of this rank's logits: one op, or two around the all-gather."""
    _, size, smoothing, z = terms
    if shards(group)[0] == 1:
        return kernels.forward(logits, targets, mask, size, smoothing, z, metrics)
    stats = kernels.partial(logits, targets, mask, terms.first, size, smoothing != 0, metrics)
    return kernels.combine(gathered(stats, group), size, smoothing, z, metrics)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        terms: Terms,
        metrics: bool,
        group: Any,
        inplace: bool,
        kernels: Any,
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            logps, saved, entropy, hit = evaluate(kernels, logits, targets, mask, terms, metrics, group)
        ctx.save_for_backward(logits, targets, saved)
        ctx.terms, ctx.inplace, ctx.kernels = terms, inplace, kernels
        ctx.mark_non_differentiable(entropy, hit)
        ctx.set_materialize_grads(False)
        return logps, entropy, hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dlogps is None:
            return (None,) * 8
        logits, targets, saved = ctx.saved_tensors
        arguments = (dlogps.contiguous(), logits, targets, saved, *ctx.terms)
        if not ctx.inplace:
            return ctx.kernels.backward(*arguments), *(None,) * 7
        ctx.kernels.backward_(*arguments)
        # So that a second backward, or whoever else saved these logits, is told instead of reading gradients.
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), *(None,) * 7


# ---------------------------------------------------------------------------------------------- public

Implementation = Literal["fused", "reference"]


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: Any = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    implementation: Implementation = "fused",
) -> Tensor:
    """ln p(target) of every row of logits: logits [..., V/tp], targets [...] int64 -> [...] fp32, in nats.

    With `label_smoothing` ε in [0, 1) it is (1 − ε) ln p(target) + ε times the mean of ln p over the
    vocabulary, with `z_loss` z it is less z · lse², so that −token_logprob is the loss in every case.

    tp_group: the ranks that share the vocabulary, each holding V/tp consecutive tokens in rank order; all
        call with the same targets and get the same result. One all-gather of 3 floats per token.
    mask: bool [...]; where False, and where the target is −100, result and gradient are 0 and the logits are
        not read.
    vocab_size: tokens in all; columns beyond are padding, without probability and gradient. Default: all V.
    inplace_backward: the backward writes its gradient over the logits, which are lost: no second backward, no
        other use of their values. For what a matmul made: leaves are refused, and an operation before this
        one that saved its output raises autograd's error (except inside torch.utils.checkpoint, where it
        cannot see).

    logits may be a view whose last stride is 1 and whose leading dimensions fold into two strides.
    Differentiable once. Raises RuntimeError for a wrong dtype, device, shape or stride, or (on CPU) a target
    out of range; on CUDA, where looking would make the host wait, that token's log-prob and gradient are NaN.
    """
    arguments = (mask, label_smoothing, z_loss, vocab_size, False, tp_group, inplace_backward, implementation)
    return _call(logits, targets, *arguments)[0]


def token_logprob_with_metrics(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: Any = None,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    implementation: Implementation = "fused",
) -> TokenMetrics:
    """`token_logprob` with the entropy of each distribution and whether the target is its mode, from the same
    read of the logits (4 floats per token in the all-gather)."""
    arguments = (mask, label_smoothing, z_loss, vocab_size, True, tp_group, inplace_backward, implementation)
    return TokenMetrics(*_call(logits, targets, *arguments))


def _call(
    logits, targets, mask, label_smoothing, z_loss, vocab_size, metrics, group, inplace, implementation
):
    ranks, rank = shards(group)
    columns = logits.shape[-1] if logits.dim() else 0
    size = max(1, ranks * columns) if vocab_size is None else vocab_size
    if not 1 <= size <= max(1, ranks * columns):
        raise RuntimeError(
            f"token_logprob: vocab_size is {size}; allowed: 1 to {ranks * columns}, the columns of all ranks"
        )
    if inplace and logits.is_leaf and logits.requires_grad:
        raise RuntimeError(
            "token_logprob: inplace_backward would overwrite logits, which is a leaf that requires grad; "
            "allowed: the output of an operation, such as a matmul"
        )
    kernels = _Fused if library.use_compiled(implementation, logits.device.type) else _Reference
    targets = targets.contiguous()
    mask = None if mask is None else mask.contiguous()
    terms = Terms(rank * columns, size, label_smoothing, z_loss)
    if torch.compiler.is_compiling() and ranks == 1 and kernels is _Fused:
        logps, _, entropy, hit = kernels.forward(
            logits, targets, mask, size, label_smoothing, z_loss, metrics
        )
        return logps, entropy, hit
    return _TokenLogprob.apply(logits, targets, mask, terms, metrics, group, inplace, kernels)
