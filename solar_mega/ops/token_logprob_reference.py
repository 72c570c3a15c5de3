"""Token log-probs in PyTorch: the formula over a whole vocabulary, and what the compiled ops do, one by one.

Formulas and shapes: token_logprob.py.
"""

import torch
from torch import Tensor

IGNORE = -100
"""A target of this value does not count, whatever the mask: log-prob 0, gradient 0."""


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


class Reference:
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
        stats = Reference.partial(logits, targets, mask, 0, size, smoothing != 0, metrics)
        return Reference.combine(stats[None], size, smoothing, z, metrics)

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
        logits.copy_(Reference.backward(dlogps, logits, *rest))
