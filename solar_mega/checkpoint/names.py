"""Hugging Face names <-> Megatron parameters: one table, and the five ways a tensor is split over
tensor-parallel ranks.

A new family whose block has the same parts is a new table; a new part is a new line and, at most, a new
packing.

    packing     Hugging Face                     Megatron, on tensor-parallel rank t of T
    REPLICATED  [h]                              [h], whole on every rank
    ROWS        [r, c]                           rows t/T .. (t+1)/T
    COLUMNS     [r, c]                           columns t/T .. (t+1)/T
    GATED       gate [f, h], up [f, h]           gate's rows t, then up's rows t            [2f/T, h]
    QKV         q [n*d, h], k, v [g*d, h]        for each of its g/T groups:  n/g query heads, key, value
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solar_mega.model.architecture import Architecture


class TensorSource(Protocol):
    """Where weights come from: a safetensors directory, or a generator of random ones."""

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Packing:
    """How one Megatron parameter is made of Hugging Face tensors, and back.

    read(source, names, arch, t, T) reads exactly what tensor-parallel rank t holds;
    unpack(shards, arch) takes the T shards in order and returns the Hugging Face tensors.
    """

    read: Callable[[TensorSource, Sequence[str], Architecture, int, int], Tensor]
    unpack: Callable[[Sequence[Tensor], Architecture], list[Tensor]]


def _part(size: int, t: int, tp: int) -> tuple[int, int]:
    return size * t // tp, size * (t + 1) // tp


def _sizes(arch: Architecture) -> tuple[int, int]:
    return arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim


def _read_replicated(source, names, arch, t, tp):
    return source.read_rows(names[0], 0, arch.hidden_size)


def _read_vocabulary(source, names, arch, t, tp):
    return source.read_rows(names[0], *_part(arch.vocab_size, t, tp))


def _read_attention_columns(source, names, arch, t, tp):
    return source.read_rows(names[0], *_part(_sizes(arch)[0], t, tp), dim=1)


def _read_ffn_columns(source, names, arch, t, tp):
    return source.read_rows(names[0], *_part(arch.ffn_hidden_size, t, tp), dim=1)


def _read_gated(source, names, arch, t, tp):
    rows = _part(arch.ffn_hidden_size, t, tp)
    return torch.cat([source.read_rows(name, *rows) for name in names])


def _read_qkv(source, names, arch, t, tp):
    query, key_value = _sizes(arch)
    rows = (query, key_value, key_value)
    parts = [source.read_rows(name, *_part(size, t, tp)) for name, size in zip(names, rows, strict=True)]
    groups = arch.num_query_groups // tp
    packed = [part.view(groups, -1, arch.head_dim, arch.hidden_size) for part in parts]
    return torch.cat(packed, dim=1).reshape(-1, arch.hidden_size)  # [groups, n/g + 2, d, h] -> rows


def _unpack_qkv(shards, arch):
    per_group = arch.num_attention_heads // arch.num_query_groups
    packed = torch.cat(list(shards)).view(
        arch.num_query_groups, per_group + 2, arch.head_dim, arch.hidden_size
    )
    parts = packed.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, arch.hidden_size) for part in parts]


def _unpack_gated(shards, arch):
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _unpack_rows(shards, arch):
    return [torch.cat(list(shards))]


def _unpack_columns(shards, arch):
    return [torch.cat(list(shards), dim=1)]


REPLICATED = Packing(_read_replicated, lambda shards, arch: [shards[0]])
VOCABULARY = Packing(_read_vocabulary, _unpack_rows)
ATTENTION_COLUMNS = Packing(_read_attention_columns, _unpack_columns)
FFN_COLUMNS = Packing(_read_ffn_columns, _unpack_columns)
GATED = Packing(_read_gated, _unpack_gated)
QKV = Packing(_read_qkv, _unpack_qkv)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. `{}` in a Hugging Face name is the layer number."""

    megatron: str
    hf: tuple[str, ...]
    packing: Packing


_L = "model.layers.{}."
LAYER_RULES = (
    Rule("input_layernorm.weight", (_L + "input_layernorm.weight",), REPLICATED),
    Rule(
        "self_attention.linear_qkv.weight",
        (_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"),
        QKV,
    ),
    Rule("self_attention.linear_proj.weight", (_L + "self_attn.o_proj.weight",), ATTENTION_COLUMNS),
    Rule("pre_mlp_layernorm.weight", (_L + "post_attention_layernorm.weight",), REPLICATED),
    Rule("mlp.linear_fc1.weight", (_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"), GATED),
    Rule("mlp.linear_fc2.weight", (_L + "mlp.down_proj.weight",), FFN_COLUMNS),
)
EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY)
FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), REPLICATED)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), VOCABULARY)
TIED_HEAD = Rule("output_layer.weight", EMBEDDING.hf, VOCABULARY)

LAYER_PREFIX = "decoder.layers."
_IN_LAYER = re.compile(rf"^{re.escape(LAYER_PREFIX)}(\d+)\.(.+)$")


def rule_of(parameter: str, arch: Architecture) -> tuple[Rule, int | None]:
    """(rule, position in the chunk's layer list or None) of a chunk's parameter name.

    Raises KeyError for a parameter the table does not know: the model has a part that would stay
    uninitialised.
    """
    match = _IN_LAYER.match(parameter)
    if match:
        return _LAYER_BY_NAME[match[2]], int(match[1])
    outside = {
        rule.megatron: rule for rule in (EMBEDDING, FINAL_NORM, TIED_HEAD if arch.tied_embeddings else HEAD)
    }
    return outside[parameter], None


_LAYER_BY_NAME = {rule.megatron: rule for rule in LAYER_RULES}


def model_rules(arch: Architecture) -> Iterator[tuple[Rule, int | None]]:
    """Every parameter of the whole model in the order transformers writes them; (rule, layer number or
    None).
    """
    yield EMBEDDING, None
    for layer in range(arch.num_layers):
        for rule in LAYER_RULES:
            yield rule, layer
    yield FINAL_NORM, None
    if not arch.tied_embeddings:
        yield HEAD, None


def hf_names(rule: Rule, layer: int | None) -> tuple[str, ...]:
    return tuple(name.format(layer) for name in rule.hf)


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of `arch`."""
    h, f, v = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    query, key_value = _sizes(arch)
    by_suffix = {
        "q_proj.weight": (query, h),
        "k_proj.weight": (key_value, h),
        "v_proj.weight": (key_value, h),
        "o_proj.weight": (h, query),
        "gate_proj.weight": (f, h),
        "up_proj.weight": (f, h),
        "down_proj.weight": (h, f),
        "embed_tokens.weight": (v, h),
        "lm_head.weight": (v, h),
    }
    shapes = {}
    for rule, layer in model_rules(arch):
        for name in hf_names(rule, layer):
            suffix = ".".join(name.split(".")[-2:])
            shapes[name] = by_suffix.get(suffix, (h,))
    return shapes
