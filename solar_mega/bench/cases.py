"""The kernels that `solar-mega bench kernels` measures: a table of inputs, formulas and floor bytes.

An operation is a set of functions with one signature, inputs (by name) -> outputs. Ours, PyTorch's and the
peers' (peers.py) run on the same tensors, forward, backward or both, and are compared with fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from solar_mega import ops

Inputs = dict[str, Tensor]
Formula = Callable[[Inputs], tuple[Tensor, ...]]
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of all operations of one run."""

    tokens: int
    hidden: int
    ffn: int
    """Width of swiglu's output."""
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    head_hidden: int
    """Hidden size of linear_token_logprob, whose time is a matrix product's."""
    pairs: int
    dtype: torch.dtype

    @property
    def element(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Mode:
    """One thing to measure of an operation."""

    name: str
    """forward, backward (alone, the graph kept) or both."""
    floor_bytes: Callable[[Shape], int] | None
    """Fewest bytes that must move through memory, for every provider alike; None when arithmetic decides."""
    counted: str
    """What the floor counts, in words."""
    flops: Callable[[Shape], float] | None = None


@dataclass(frozen=True)
class Operation:
    name: str
    draw: Callable[[Shape, torch.device], Inputs]
    leaves: tuple[str, ...]
    """Inputs that receive a gradient."""
    grads: tuple[str, ...]
    """Inputs that are the outputs' gradients in a backward."""
    reference: Formula
    """In fp64 when its inputs are."""
    providers: dict[str, Formula]
    """Ours first. torch.compile compiles `torch eager`."""
    modes: tuple[Mode, ...]
    overwriting: frozenset[str] = field(default_factory=frozenset)
    """Providers whose backward overwrites inputs: they get copies of their own."""
    backward_only: frozenset[str] = field(default_factory=frozenset)
    """Providers that differ from another one in the backward alone."""


def call_for(
    operation: Operation, formula: Formula, mode: str, inputs: Inputs
) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed; what it needs beforehand (a backward its forward) has run when this returns."""
    if mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return formula(inputs)

        return forward
    leaves = {name: inputs[name].detach().requires_grad_() for name in operation.leaves}
    given = inputs | leaves
    grads = [inputs[name] for name in operation.grads]

    def gradients(outputs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        # Without grads the outputs are scalar losses.
        return torch.autograd.grad(outputs[: len(grads) or 1], list(leaves.values()), grads or None, keep)

    if mode == "both":
        return lambda: gradients(formula(given), False)
    outputs = formula(given)
    return lambda: gradients(outputs, True)


def fp64(inputs: Inputs) -> Inputs:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


# ---------------------------------------------------------------------------------------------- norms


def _draw_norm(s: Shape, device: torch.device) -> Inputs:
    names = ("x", "residual", "dy", "dresidual")
    tensors = {name: torch.randn(s.tokens, 1, s.hidden, device=device).to(s.dtype) for name in names}
    return tensors | {"weight": torch.rand(s.hidden, device=device).add(0.5).to(s.dtype)}


def _norm_eager(i: Inputs) -> tuple[Tensor, ...]:
    """As transformers' LlamaRMSNorm writes it."""
    wide = i["x"].float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (i["weight"] * wide.to(i["x"].dtype),)


def _add_norm_eager(i: Inputs) -> tuple[Tensor, ...]:
    total = i["x"] + i["residual"]
    return *_norm_eager(i | {"x": total}), total


def _rows(passes: int) -> Callable[[Shape], int]:
    return lambda s: passes * s.tokens * s.hidden * s.element + 4 * s.tokens


_NO_PARTIALS = "rstd is counted; weight and the weight gradient's partials are not"
_RMS_NORM = Operation(
    "rms_norm",
    _draw_norm,
    leaves=("x", "weight"),
    grads=("dy",),
    reference=lambda i: (ops.rms_norm_reference(i["x"], i["weight"], EPS),),
    providers={
        "solar_mega": lambda i: (ops.rms_norm(i["x"], i["weight"], EPS),),
        "torch eager": _norm_eager,
        "torch F.rms_norm": lambda i: (F.rms_norm(i["x"], i["weight"].shape, i["weight"], EPS),),
    },
    modes=(
        Mode("forward", _rows(2), f"x read, y written; {_NO_PARTIALS}"),
        Mode("backward", _rows(3), f"x and dy read, dx written; {_NO_PARTIALS}"),
    ),
)
_ADD_RMS_NORM = Operation(
    "add_rms_norm",
    _draw_norm,
    leaves=("x", "residual", "weight"),
    grads=("dy", "dresidual"),
    reference=lambda i: ops.add_rms_norm_reference(i["x"], i["residual"], i["weight"], EPS),
    providers={
        "solar_mega": lambda i: ops.add_rms_norm(i["x"], i["residual"], i["weight"], EPS),
        "torch eager": _add_norm_eager,
    },
    modes=(
        Mode("forward", _rows(4), f"x and residual read, y and the sum written; {_NO_PARTIALS}"),
        Mode("backward", _rows(4), f"sum, dy and dresidual read, dx written once for both; {_NO_PARTIALS}"),
    ),
)

# ---------------------------------------------------------------------------------------------- rotary


def _draw_qkv(s: Shape, device: torch.device) -> Inputs:
    per_group = s.heads // s.kv_heads
    inputs = {
        "qkv": torch.randn(s.tokens, 1, s.kv_heads, (per_group + 2) * s.head_dim, device=device).to(s.dtype)
    }
    for name, heads in (("dq", s.heads), ("dk", s.kv_heads), ("dv", s.kv_heads)):
        inputs[name] = torch.randn(s.tokens, 1, heads, s.head_dim, device=device).to(s.dtype)
    frequency = 1e4 ** -(torch.arange(0, s.head_dim, 2, device=device) / s.head_dim)
    angles = torch.arange(s.tokens, device=device)[:, None] * frequency
    return inputs | {"angles": angles, "cos": angles.cos(), "sin": angles.sin()}


def split_qkv(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's own split: q [s, b, heads, d], k, v [s, b, kv_heads, d]; k and v are views."""
    qkv, heads, groups = i["qkv"], i["dq"].shape[2], i["qkv"].shape[2]
    d = qkv.shape[-1] // (heads // groups + 2)
    q, k, v = torch.split(qkv, [heads // groups * d, d, d], dim=3)
    return q.reshape(*qkv.shape[:2], heads, d), k, v


def _rotary_eager(i: Inputs) -> tuple[Tensor, ...]:
    q, k, v = split_qkv(i)
    cos, sin = (torch.cat([i[n], i[n]], -1)[:, None, None].to(q.dtype) for n in ("cos", "sin"))

    def turn(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], -1) * sin

    return turn(q), turn(k), v


def _rotary(function: Callable[..., tuple[Tensor, ...]]) -> Formula:
    def formula(i: Inputs) -> tuple[Tensor, ...]:
        return function(i["qkv"], i["cos"], i["sin"], i["dq"].shape[2] // i["qkv"].shape[2])

    return formula


def _rotary_bytes(s: Shape) -> int:
    return 2 * s.tokens * (s.heads + s.kv_heads) * s.head_dim * s.element + 4 * s.tokens * s.head_dim


_QKV_ROTARY = Operation(
    "qkv_rotary",
    _draw_qkv,
    leaves=("qkv",),
    grads=("dq", "dk", "dv"),
    reference=_rotary(ops.qkv_rotary_reference),
    providers={"solar_mega": _rotary(ops.qkv_rotary), "torch eager": _rotary_eager},
    modes=(
        Mode(
            "forward",
            _rotary_bytes,
            "q and k read and written, cos and sin read; v not, also where it is copied",
        ),
        Mode(
            "backward", _rotary_bytes, "as the forward, though dv must be moved into the packed gradient too"
        ),
    ),
)

# ---------------------------------------------------------------------------------------------- SwiGLU


def _draw_swiglu(s: Shape, device: torch.device) -> Inputs:
    x = torch.randn(s.tokens, 1, 2 * s.ffn, device=device).to(s.dtype)
    return {"x": x, "dy": torch.randn(s.tokens, 1, s.ffn, device=device).to(s.dtype)}


def _swiglu_eager(i: Inputs) -> tuple[Tensor, ...]:
    gate, up = i["x"].chunk(2, -1)
    return (F.silu(gate) * up,)


def _ffn_rows(passes: int) -> Callable[[Shape], int]:
    return lambda s: passes * s.tokens * s.ffn * s.element


_SWIGLU = Operation(
    "swiglu",
    _draw_swiglu,
    leaves=("x",),
    grads=("dy",),
    reference=lambda i: (ops.swiglu_reference(i["x"]),),
    providers={"solar_mega": lambda i: (ops.swiglu(i["x"]),), "torch eager": _swiglu_eager},
    modes=(
        Mode("forward", _ffn_rows(3), "both halves read, y written"),
        Mode("backward", _ffn_rows(5), "both halves and dy read, both gradients written"),
    ),
)

# ---------------------------------------------------------------------------------------------- log-probs


def _draw_logits(s: Shape, device: torch.device) -> Inputs:
    logits = torch.randn(s.tokens, s.vocab, device=device).mul_(2).to(s.dtype)
    return {"logits": logits, "dlogp": torch.rand(s.tokens, device=device)} | _targets(s, device)


def _targets(s: Shape, device: torch.device) -> Inputs:
    return {"targets": torch.randint(s.vocab, (s.tokens,), device=device)}


def _logprob_eager(i: Inputs) -> tuple[Tensor, ...]:
    logps = torch.log_softmax(i["logits"], -1, dtype=torch.promote_types(i["logits"].dtype, torch.float32))
    return (logps.gather(-1, i["targets"][:, None]).squeeze(-1),)


def _logprob_cross_entropy(i: Inputs) -> tuple[Tensor, ...]:
    wide = torch.promote_types(i["logits"].dtype, torch.float32)
    return (-F.cross_entropy(i["logits"].to(wide), i["targets"], reduction="none"),)


def _logprob_ours(i: Inputs) -> tuple[Tensor, ...]:
    logits = i["logits"]
    if logits.requires_grad:  # a leaf may not be overwritten; in a model the logits are a product
        logits = logits.view_as(logits)
    return (ops.token_logprob(logits, i["targets"], inplace_backward=logits.requires_grad),)


_TOKEN_LOGPROB = Operation(
    "token_logprob",
    _draw_logits,
    leaves=("logits",),
    grads=("dlogp",),
    reference=_logprob_eager,
    providers={
        "solar_mega": _logprob_ours,
        "torch eager": _logprob_eager,
        "torch F.cross_entropy": _logprob_cross_entropy,
    },
    modes=(
        Mode("forward", lambda s: s.tokens * (s.vocab * s.element + 4), "logits read"),
        Mode(
            "both",
            lambda s: s.tokens * (3 * s.vocab * s.element + 4),
            "logits read in the forward, read again and written (as their gradient) in the backward",
        ),
    ),
    # Megatron's subtract the maximum from fp32 logits where they are.
    overwriting=frozenset({"solar_mega", "flash-attn", "liger", "quack", "megatron local", "megatron fused"}),
)


def _draw_linear(s: Shape, device: torch.device) -> Inputs:
    hidden = torch.randn(s.tokens, s.head_hidden, device=device).to(s.dtype)
    weight = torch.randn(s.vocab, s.head_hidden, device=device).mul_(2 * s.head_hidden**-0.5).to(s.dtype)
    dlogp = torch.rand(s.tokens, device=device)
    return {"hidden": hidden, "weight": weight, "dlogp": dlogp} | _targets(s, device)


def _linear(formula: Formula) -> Formula:
    """The head in front of a formula on logits."""
    return lambda i: formula({"logits": i["hidden"] @ i["weight"].t(), "targets": i["targets"]})


def _linear_ours(i: Inputs) -> tuple[Tensor, ...]:
    return (ops.linear_token_logprob(i["hidden"], i["weight"], i["targets"]),)


def _linear_ours_weighted(i: Inputs) -> tuple[Tensor, ...]:
    return (ops.linear_token_logprob(i["hidden"], i["weight"], i["targets"], token_weights=i["dlogp"]),)


def _matmul_flops(passes: int) -> Callable[[Shape], float]:
    return lambda s: 2.0 * passes * s.tokens * s.vocab * s.head_hidden


_LINEAR_TOKEN_LOGPROB = Operation(
    "linear_token_logprob",
    _draw_linear,
    leaves=("hidden", "weight"),
    grads=("dlogp",),
    reference=_linear(_logprob_eager),
    providers={
        "solar_mega": _linear_ours,
        "solar_mega, weights given": _linear_ours_weighted,
        "torch eager": _linear(_logprob_eager),
        "torch F.cross_entropy": _linear(_logprob_cross_entropy),
    },
    modes=(
        Mode("forward", None, "bound by the matrix product: FLOP are counted", _matmul_flops(1)),
        Mode("both", None, "bound by the matrix products: FLOP of three are counted", _matmul_flops(3)),
    ),
    backward_only=frozenset({"solar_mega, weights given"}),
)

# ---------------------------------------------------------------------------------------------- DPO


def _draw_dpo(s: Shape, device: torch.device) -> Inputs:
    length = s.tokens // (2 * s.pairs)
    ends = torch.arange(2 * s.pairs + 1, device=device, dtype=torch.int32) * length
    logps = {name: -4 * torch.rand(2 * s.pairs * length, device=device) for name in ("logps", "reference")}
    mask = torch.rand(2 * s.pairs * length, device=device) < 0.7
    return logps | {"cu_seqlens": ends, "mask": mask}


def dpo_eager(i: Inputs) -> tuple[Tensor, ...]:
    """As TRL computes it, from sequences of one length: no padding to pay for."""
    shape = (i["cu_seqlens"].numel() - 1, -1)
    mask = i["mask"].view(shape)
    ratio = (i["logps"].view(shape) * mask).sum(-1) - (i["reference"].view(shape) * mask).sum(-1)
    chosen, rejected = 0.1 * ratio[0::2], 0.1 * ratio[1::2]
    return -F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()


def _dpo(function: Callable[..., ops.DPOLoss]) -> Formula:
    def formula(i: Inputs) -> tuple[Tensor, ...]:
        got = function(i["logps"], i["cu_seqlens"], mask=i["mask"], reference_token_logps=i["reference"])
        return got.loss, got.chosen_rewards, got.rejected_rewards

    return formula


_DPO_LOSS = Operation(
    "dpo_loss",
    _draw_dpo,
    leaves=("logps",),
    grads=(),
    reference=_dpo(ops.dpo_loss_reference),
    providers={"solar_mega": _dpo(ops.dpo_loss), "torch eager": dpo_eager},
    modes=(
        Mode(
            "both",
            lambda s: 13 * s.tokens,
            "log-probs, reference and mask read, coefficients written; a few bytes in all: latency decides",
        ),
    ),
)

_ALL = (_RMS_NORM, _ADD_RMS_NORM, _QKV_ROTARY, _SWIGLU, _TOKEN_LOGPROB, _LINEAR_TOKEN_LOGPROB, _DPO_LOSS)
OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ALL}
