"""A grown model asks a shallower checkpoint for its weights: depthwise scaling as a load plan.

megatron-core loads by name and offset: each rank describes the tensors it holds, and reads those bytes. So a
target layer g that describes itself as source layer map[g] is filled from there, on any TP, PP and VPP, and
with it its optimizer states, whose names derive from the parameter's.

    checkpoint          a layer's weight is                          layer g asks for
    per layer           its own tensor  decoder.layers.7.<name>      the key of layer map[g]
    homogeneous         a row of        decoder.layers.<name>        row map[g] of the leading layer axis
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from torch import nn

from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError

_PREFIX = "decoder.layers."
_LAYER_KEY = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SourceDepth:
    """How a checkpoint holds its layers."""

    layers: int
    homogeneous: bool

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]]) -> "SourceDepth":
        """From the global shapes of a checkpoint's tensors. Raises UserError when there are no decoder
        layers.
        """
        numbers = [int(match[1]) for key in shapes if (match := _LAYER_KEY.match(key))]
        if numbers:
            return cls(max(numbers) + 1, homogeneous=False)
        stacked = [shape[0] for key, shape in shapes.items() if key.startswith(_PREFIX)]
        if not stacked:
            raise UserError("the checkpoint holds no decoder layers (no tensor is named decoder.layers.*)")
        return cls(stacked[0], homogeneous=True)


def mapped_state_dict(
    chunk: nn.Module, layer_map: LayerMap, source: SourceDepth, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The sharded state dict of one chunk of the grown model, aimed at the source's layers. For loading only.

    Everything outside the decoder layers is asked for as usual. Hand the result to
    `optimizer.sharded_state_dict(..., is_loading=True)` to aim the optimizer states the same way.

    Raises UserError when the map has fresh layers (nothing in a checkpoint can fill them) or was made for
    another depth than the source's.
    """
    if layer_map.fresh:
        raise UserError(
            f'layer map "{layer_map}": target layers {", ".join(map(str, layer_map.fresh))} are fresh, and '
            "a Megatron checkpoint has no weights for them; use a map that copies every layer"
        )
    if layer_map.changed:
        raise UserError(
            f'layer map "{layer_map}": target layers {", ".join(map(str, layer_map.changed[:8]))} are '
            "averaged, scaled or noised, which bytes of a Megatron checkpoint cannot give"
        )
    if layer_map.source_layers != source.layers:
        raise UserError(
            f'layer map "{layer_map}" is for {layer_map.source_layers} layers; the checkpoint '
            f"has {source.layers}"
        )
    metadata = {**metadata, "non_homogeneous_layers": not source.homogeneous}
    plain = chunk.sharded_state_dict(metadata=metadata)
    result = {key: value for key, value in plain.items() if not key.startswith(_PREFIX)}
    for position, layer in enumerate(chunk.decoder.layers):
        result.update(_mapped_layer(layer, position, layer_map, source, metadata))
    return result


def _mapped_layer(
    layer: nn.Module, position: int, layer_map: LayerMap, source: SourceDepth, metadata: dict
) -> dict:
    target = layer.layer_number - 1
    origin = layer_map[target]
    own = f"{_PREFIX}{position}."
    offsets = [(0, origin, source.layers)] if source.homogeneous else []
    entries = layer.sharded_state_dict(own, offsets, metadata)
    replace_prefix_for_sharding(entries, own, _PREFIX if source.homogeneous else f"{_PREFIX}{origin}.")
    earlier = layer_map.copies_of(origin).index(target)
    for key, entry in entries.items():
        if isinstance(entry, ShardedObject):
            # Transformer Engine's per-module extras (FP8 scales) describe a layer at its old place: keep our
            # own.
            entries[key] = LocalNonpersistentObject(entry.data)
            continue
        if earlier:
            # Megatron counts owners: each byte has exactly one main reader, and that is the first copy's.
            entry.replica_id = (earlier, *entry.replica_id[1:])
        if source.homogeneous:
            entries[key] = _with_layer_axis(entry, origin, source.layers)
    return entries


def _with_layer_axis(
    entry: ShardedTensor | ShardedTensorFactory, origin: int, layers: int
) -> ShardedTensorFactory:
    """The entry with its layer as a real leading dimension of size 1, taken off again after loading.

    Megatron's own form, an axis that exists in the checkpoint but not in the tensor, goes through a code path
    that takes two tensors of one name on one rank for shards of one tensor, and refuses two copies of one
    source layer as overlapping.
    """
    if isinstance(entry, ShardedTensorFactory):
        build, merge = entry.build_fn, entry.merge_fn

        def build_with_axis(key, data, replica_id, flattened_range):
            parts = build(key, data, replica_id, flattened_range)
            dict_list_map_inplace(lambda part: _unfold(part, origin, layers), parts)
            return parts

        return replace(entry, build_fn=build_with_axis, merge_fn=lambda parts: merge(_fold(parts)))

    def build_one(key, data, replica_id, flattened_range):
        tensor = replace(entry, key=key, data=data.detach(), dtype=data.dtype, replica_id=replica_id)
        return _unfold(tensor, origin, layers)

    return ShardedTensorFactory(entry.key, entry.data, build_one, _fold, entry.replica_id)


def _unfold(tensor: ShardedTensor, origin: int, layers: int) -> ShardedTensor:
    return replace(
        tensor,
        data=tensor.data.unsqueeze(0),
        local_shape=(1, *tensor.local_shape),
        global_shape=(layers, *tensor.global_shape[1:]),
        global_offset=(origin, *tensor.global_offset[1:]),
        axis_fragmentations=(layers, *tensor.axis_fragmentations[1:]),
        prepend_axis_num=0,
    )


def _fold(loaded: Any) -> Any:
    if isinstance(loaded, torch.Tensor):
        return loaded[0]
    if isinstance(loaded, dict):
        return {key: _fold(value) for key, value in loaded.items()}
    return [_fold(value) for value in loaded]
