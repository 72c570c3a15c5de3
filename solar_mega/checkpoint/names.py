"""Hugging Face names <-> Megatron parameters, and the ways a tensor is split over tensor-parallel ranks.

Which tensors a family's layer has is a table in `model.families`; here is what its words mean.

    packing              Hugging Face                  Megatron, on tensor-parallel rank t of T
    replicated           [h]                           [h], whole on every rank
    head_norm            [d]                           [d], whole on every rank
    vocabulary           [v, h]                        rows t/T .. (t+1)/T
    attention_columns    [h, n*d]                      columns t/T .. (t+1)/T
    ffn_columns          [h, f]                        columns t/T .. (t+1)/T
    gated                gate [f, h], up [f, h]        gate's rows t, then up's rows t         [2f/T, h]
    fused_gated          gate above up [2f, h]         the same
    qkv                  q [n*d, h], k, v [g*d, h]     for each of its g/T groups: n/g query heads, key, value
    fused_qkv            q above k above v             the same
    qkv_bias             q [n*d], k, v [g*d]           the same without h
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solar_mega.model.architecture import Architecture
from solar_mega.model.families import FAMILIES


class TensorSource(Protocol):
    """Where weights come from: a safetensors directory, or a generator of random ones."""

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Packing:
    """How one Megatron parameter is made of Hugging Face tensors, and back.

    read(source, names, arch, t, T) reads exactly what tensor-parallel rank t holds;
    unpack(shards, arch) takes the T shards in order and returns the Hugging Face tensors;
    shapes(arch) are those of the Hugging Face tensors.
    """

    read: Callable[[TensorSource, Sequence[str], Architecture, int, int], Tensor]
    unpack: Callable[[Sequence[Tensor], Architecture], list[Tensor]]
    shapes: Callable[[Architecture], list[tuple[int, ...]]]
    gated: bool = False
    """The parameter is two halves, of which every rank holds a stretch each."""


def _part(size: int, t: int, tp: int) -> tuple[int, int]:
    return size * t // tp, size * (t + 1) // tp


def _query(arch: Architecture) -> int:
    return arch.num_attention_heads * arch.head_dim


def _qkv_sizes(arch: Architecture) -> tuple[int, int, int]:
    key_value = arch.num_query_groups * arch.head_dim
    return _query(arch), key_value, key_value


def _gate_sizes(arch: Architecture) -> tuple[int, int]:
    return arch.ffn_hidden_size, arch.ffn_hidden_size


def _read_sections(source, names, sizes, t, tp) -> list[Tensor]:
    """This rank's rows of each section. Sections are tensors, or stand one below the other in a single
    one."""
    fused = len(names) == 1
    starts = [sum(sizes[:i]) if fused else 0 for i in range(len(sizes))]
    parts = []
    for name, start, size in zip(names * len(sizes) if fused else names, starts, sizes, strict=True):
        first, last = _part(size, t, tp)
        parts.append(source.read_rows(name, start + first, start + last))
    return parts


def _read_qkv(source, names, arch, t, tp):
    parts = _read_sections(source, names, _qkv_sizes(arch), t, tp)
    rest = parts[0].shape[1:]  # (h,), or () for a bias
    packed = [part.view(arch.num_query_groups // tp, -1, arch.head_dim, *rest) for part in parts]
    return torch.cat(packed, dim=1).reshape(-1, *rest)  # [groups, n/g + 2, d, h] -> rows


def _unpack_qkv(shards, arch):
    whole = torch.cat(list(shards))
    per_group = arch.num_attention_heads // arch.num_query_groups
    packed = whole.view(arch.num_query_groups, per_group + 2, arch.head_dim, *whole.shape[1:])
    return [part.reshape(-1, *whole.shape[1:]) for part in packed.split([per_group, 1, 1], dim=1)]


def _read_gated(source, names, arch, t, tp):
    return torch.cat(_read_sections(source, names, _gate_sizes(arch), t, tp))


def _unpack_gated(shards, arch):
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _replicated(size: Callable[[Architecture], int]) -> Packing:
    return Packing(
        lambda source, names, arch, t, tp: source.read_rows(names[0], 0, size(arch)),
        lambda shards, arch: [shards[0]],
        lambda arch: [(size(arch),)],
    )


def _columns(size: Callable[[Architecture], int]) -> Packing:
    return Packing(
        lambda source, names, arch, t, tp: source.read_rows(names[0], *_part(size(arch), t, tp), dim=1),
        lambda shards, arch: [torch.cat(list(shards), dim=1)],
        lambda arch: [(arch.hidden_size, size(arch))],
    )


def _matrices(sizes: Callable[[Architecture], Sequence[int]]) -> Callable[[Architecture], list]:
    return lambda arch: [(size, arch.hidden_size) for size in sizes(arch)]


VOCABULARY = Packing(
    lambda source, names, arch, t, tp: source.read_rows(names[0], *_part(arch.vocab_size, t, tp)),
    lambda shards, arch: [torch.cat(list(shards))],
    lambda arch: [(arch.vocab_size, arch.hidden_size)],
)
REPLICATED = _replicated(lambda arch: arch.hidden_size)
GATED = Packing(_read_gated, _unpack_gated, _matrices(_gate_sizes), gated=True)
PACKINGS: Mapping[str, Packing] = {
    "replicated": REPLICATED,
    "head_norm": _replicated(lambda arch: arch.head_dim),
    "vocabulary": VOCABULARY,
    "attention_columns": _columns(_query),
    "ffn_columns": _columns(lambda arch: arch.ffn_hidden_size),
    "gated": GATED,
    "fused_gated": Packing(
        _read_gated,
        lambda shards, arch: [torch.cat(_unpack_gated(shards, arch))],
        _matrices(lambda arch: [sum(_gate_sizes(arch))]),
        gated=True,
    ),
    "qkv": Packing(_read_qkv, _unpack_qkv, _matrices(_qkv_sizes)),
    "fused_qkv": Packing(
        _read_qkv,
        lambda shards, arch: [torch.cat(_unpack_qkv(shards, arch))],
        _matrices(lambda arch: [sum(_qkv_sizes(arch))]),
    ),
    "qkv_bias": Packing(_read_qkv, _unpack_qkv, lambda arch: [(size,) for size in _qkv_sizes(arch)]),
}


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. `{}` in a Hugging Face name is the layer number."""

    megatron: str
    hf: tuple[str, ...]
    packing: Packing


EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY)
FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), REPLICATED)
HEAD = Rule("output_layer.weight", ("lm_head.weight",), VOCABULARY)
TIED_HEAD = Rule("output_layer.weight", EMBEDDING.hf, VOCABULARY)


@functools.cache
def layer_rules(family: str) -> Mapping[str, Rule]:
    """The parameters of a layer of a family (`Architecture.family`), by their Megatron names."""
    block = next(entry for entry in FAMILIES.values() if entry.model_type == family)
    return {
        parameter: Rule(parameter, tuple(f"model.layers.{{}}.{name}" for name in names), PACKINGS[packing])
        for parameter, (packing, *names) in block.layer.items()
    }


LAYER_PREFIX = "decoder.layers."
_IN_LAYER = re.compile(rf"^{re.escape(LAYER_PREFIX)}(\d+)\.(.+)$")


def rule_of(parameter: str, arch: Architecture) -> tuple[Rule, int | None]:
    """(rule, position in the chunk's layer list or None) of a chunk's parameter name.

    Raises KeyError for a parameter the table does not know: the model has a part that would stay
    uninitialised.
    """
    match = _IN_LAYER.match(parameter)
    if match:
        return layer_rules(arch.family)[match[2]], int(match[1])
    outside = {
        rule.megatron: rule for rule in (EMBEDDING, FINAL_NORM, TIED_HEAD if arch.tied_embeddings else HEAD)
    }
    return outside[parameter], None


def model_rules(arch: Architecture) -> Iterator[tuple[Rule, int | None]]:
    """Every parameter of the whole model in the order transformers writes them; (rule, layer number or
    None).
    """
    yield EMBEDDING, None
    for layer in range(arch.num_layers):
        for rule in layer_rules(arch.family).values():
            yield rule, layer
    yield FINAL_NORM, None
    if not arch.tied_embeddings:
        yield HEAD, None


def hf_names(rule: Rule, layer: int | None) -> tuple[str, ...]:
    return tuple(name.format(layer) for name in rule.hf)


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of `arch`."""
    shapes = {}
    for rule, layer in model_rules(arch):
        shapes.update(zip(hf_names(rule, layer), rule.packing.shapes(arch), strict=True))
    return shapes
