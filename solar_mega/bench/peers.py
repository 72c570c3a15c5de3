"""Other people's kernels, where they are installed: operation -> name -> how to get its formula (cases.py).

Every entry imports its package when called. ImportError means "not installed", and anything else that goes
wrong is reported beside the name: a peer never stops the benchmark.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from solar_mega.bench.cases import EPS, Formula, Inputs, split_qkv

Loader = Callable[[], Formula]


def _from(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


# ---------------------------------------------------------------------------------------------- norms


def _module_norm(make: Callable[[Tensor], torch.nn.Module]) -> Formula:
    """A norm that comes as a module: it is given our weight itself, so that the gradient arrives there."""
    modules: dict[int, torch.nn.Module] = {}

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        weight = i["weight"]
        if weight.data_ptr() not in modules:
            modules[weight.data_ptr()] = make(weight)
        module = modules[weight.data_ptr()]
        return (torch.func.functional_call(module, {"weight": weight}, (i["x"],)),)

    return formula


def _megatron_norm() -> Formula:
    norm = _from("megatron.core.transformer.torch_norm", "WrappedTorchNorm")
    config = _from("megatron.core.transformer", "TransformerConfig")(
        num_layers=1, hidden_size=64, num_attention_heads=1, normalization="RMSNorm"
    )
    return _module_norm(lambda w: norm(config, w.numel(), eps=EPS).to(w.device, w.dtype))


def _te_norm() -> Formula:
    norm = _from("transformer_engine.pytorch", "RMSNorm")
    return _module_norm(lambda w: norm(w.numel(), eps=EPS, dtype=w.dtype, device=w.device))


def _apex_norm() -> Formula:
    norm = _from("apex.normalization", "FusedRMSNorm")
    return _module_norm(lambda w: norm(w.numel(), eps=EPS).to(w.device, w.dtype))


def _liger_norm() -> Formula:
    norm = _from("liger_kernel.transformers.functional", "liger_rms_norm")
    return lambda i: (norm(i["x"], i["weight"], EPS, in_place=False),)


def _liger_add_norm() -> Formula:
    norm = _from("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
    return lambda i: norm(i["x"], i["residual"], i["weight"], EPS, in_place=False)


def _quack_norm() -> Formula:
    norm = _from("quack", "rmsnorm")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        return (norm(i["x"].flatten(0, 1), i["weight"], eps=EPS).view_as(i["x"]),)

    return formula


def _quack_add_norm() -> Formula:
    norm = _from("quack", "rmsnorm")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        rows = (i["x"].flatten(0, 1), i["weight"])
        y, total = norm(*rows, residual=i["residual"].flatten(0, 1), eps=EPS, prenorm=True)
        return y.view_as(i["x"]), total.view_as(i["x"])

    return formula


def _flash_norm() -> Formula:
    norm = _from("flash_attn.ops.triton.layer_norm", "rms_norm_fn")
    return lambda i: (norm(i["x"], i["weight"], None, eps=EPS),)


def _flash_add_norm() -> Formula:
    norm = _from("flash_attn.ops.triton.layer_norm", "rms_norm_fn")
    return lambda i: norm(i["x"], i["weight"], None, residual=i["residual"], eps=EPS, prenorm=True)


# ---------------------------------------------------------------------------------------------- rotary


def _megatron_rotary() -> Formula:
    turn = _from("megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        q, k, v = split_qkv(i)
        freqs = torch.cat([i["angles"], i["angles"]], -1)[:, None, None]
        return turn(q, freqs), turn(k, freqs), v

    return formula


def _te_rotary() -> Formula:
    turn = _from("transformer_engine.pytorch.attention.rope", "apply_rotary_pos_emb")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        q, k, v = split_qkv(i)
        freqs = torch.cat([i["angles"], i["angles"]], -1)[:, None, None]
        return *(turn(t, freqs, tensor_format="sbhd", fused=True) for t in (q, k)), v

    return formula


def _liger_rotary() -> Formula:
    turn = _from("liger_kernel.transformers.functional", "liger_rope")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        q, k, v = split_qkv(i)
        cos, sin = (torch.cat([i[name], i[name]], -1)[None].to(q.dtype) for name in ("cos", "sin"))
        # [s, b, heads, d] -> [b, heads, s, d] and back
        q, k = turn(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos, sin)
        return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3), v

    return formula


def _flash_rotary() -> Formula:
    turn = _from("flash_attn.layers.rotary", "apply_rotary_emb")

    def formula(i: Inputs) -> tuple[Tensor, ...]:
        q, k, v = split_qkv(i)
        cos, sin = i["cos"].to(q.dtype), i["sin"].to(q.dtype)
        return *(turn(t.transpose(0, 1), cos, sin).transpose(0, 1) for t in (q, k)), v

    return formula


# ---------------------------------------------------------------------------------------------- SwiGLU


def _megatron_swiglu() -> Formula:
    swiglu = _from("megatron.core.fusions.fused_bias_swiglu", "bias_swiglu_impl")
    return lambda i: (swiglu(i["x"], None),)


def _liger_swiglu() -> Formula:
    swiglu = _from("liger_kernel.transformers.functional", "liger_swiglu")
    return lambda i: (swiglu(*i["x"].chunk(2, -1)),)


# ---------------------------------------------------------------------------------------------- log-probs


def _megatron_logprob() -> Formula:
    loss = _from("megatron.core.tensor_parallel", "vocab_parallel_cross_entropy")
    return lambda i: (-loss(i["logits"], i["targets"]),)


def _megatron_fused_logprob() -> Formula:
    loss = _from("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy")
    group = _from("megatron.core.parallel_state", "get_tensor_model_parallel_group")()
    return lambda i: (-loss(i["logits"][:, None], i["targets"][:, None], group)[:, 0],)


def _te_logprob() -> Formula:
    loss = _from("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")
    return lambda i: (-loss(i["logits"][:, None], i["targets"][:, None], 0.0, False, None)[:, 0],)


def _liger_logprob() -> Formula:
    loss = _from("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda i: (-loss(i["logits"], i["targets"], reduction="none"),)


def _quack_logprob() -> Formula:
    loss = _from("quack", "cross_entropy")
    return lambda i: (-loss(i["logits"], i["targets"], reduction="none", inplace_backward=True),)


def _flash_logprob() -> Formula:
    loss = _from("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda i: (-loss(i["logits"], i["targets"], inplace_backward=True)[0],)


def _on_logits(load: Loader) -> Loader:
    """A peer without a fused head: the product in front of its log-probs."""

    def loader() -> Formula:
        formula = load()
        return lambda i: formula({"logits": i["hidden"] @ i["weight"].t(), "targets": i["targets"]})

    return loader


PEERS: dict[str, dict[str, Loader]] = {
    "rms_norm": {
        "megatron local": _megatron_norm,
        "transformer engine": _te_norm,
        "apex": _apex_norm,
        "liger": _liger_norm,
        "quack": _quack_norm,
        "flash-attn": _flash_norm,
    },
    "add_rms_norm": {"liger": _liger_add_norm, "quack": _quack_add_norm, "flash-attn": _flash_add_norm},
    "qkv_rotary": {
        "megatron local": _megatron_rotary,
        "transformer engine": _te_rotary,
        "liger": _liger_rotary,
        "flash-attn": _flash_rotary,
    },
    "swiglu": {"megatron fused": _megatron_swiglu, "liger": _liger_swiglu},
    "token_logprob": {
        "megatron local": _megatron_logprob,
        "megatron fused": _megatron_fused_logprob,
        "transformer engine": _te_logprob,
        "liger": _liger_logprob,
        "quack": _quack_logprob,
        "flash-attn": _flash_logprob,
    },
    "linear_token_logprob": {
        "megatron local": _on_logits(_megatron_logprob),
        "quack": _on_logits(_quack_logprob),
        "liger": _on_logits(_liger_logprob),
        "flash-attn": _on_logits(_flash_logprob),
    },
    "dpo_loss": {},
}
