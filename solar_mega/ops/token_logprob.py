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
from solar_mega.ops.token_logprob_reference import Reference


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


# ---------------------------------------------------------------------------------------------- op


class Fused:
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
    return Fused.backward(dlogps.contiguous(), logits, targets, saved, 0, *ctx.terms), *(None,) * 6


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
    kernels = Fused if library.use_compiled(implementation, logits.device.type) else Reference
    targets = targets.contiguous()
    mask = None if mask is None else mask.contiguous()
    terms = Terms(rank * columns, size, label_smoothing, z_loss)
    if torch.compiler.is_compiling() and ranks == 1 and kernels is Fused:
        logps, _, entropy, hit = kernels.forward(
            logits, targets, mask, size, label_smoothing, z_loss, metrics
        )
        return logps, entropy, hit
    return _TokenLogprob.apply(logits, targets, mask, terms, metrics, group, inplace, kernels)
