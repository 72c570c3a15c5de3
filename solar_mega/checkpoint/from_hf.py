"""Hugging Face checkpoint -> the ranks, through a layer map: each rank reads the rows it will hold, and no
others.
"""

from collections.abc import Sequence

import torch
from torch import nn

from solar_mega.artifact.hf import split_layer
from solar_mega.artifact.layer_source import MappedSource
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.checkpoint.names import TensorSource, hf_names, hf_shapes, rule_of
from solar_mega.config.schema import ParallelConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.model.architecture import Architecture


def load_weights(
    chunks: Sequence[nn.Module],
    source: TensorSource,
    arch: Architecture,
    layer_map: LayerMap,
    parallel: ParallelConfig,
) -> None:
    """Fill every parameter of this rank's chunks from `source`. Not collective: each rank reads on its own.

    Args:
        chunks: what `model.build_model` returned, at the depth of `layer_map`.
        source: a checkpoint at the depth the map starts from; where the map changes layers, it must tell
            dtypes and shapes too (`artifact.layer_source.Reader`).
        arch: architecture of either depth; only its per-layer sizes are used.
        layer_map: target layer -> its origin and what is changed; frozen layers are loaded like others.

    Raises:
        UserError: the map has fresh layers.
        KeyError: the model has a parameter that the name table does not know.
    """
    if layer_map.fresh:
        raise UserError(
            f'layer map "{layer_map}": target layers {", ".join(map(str, layer_map.fresh))} are fresh, and '
            "the source has no weights for them; use a map that copies every layer"
        )
    t = _tensor_parallel_rank()
    mapped = MappedSource(source, layer_map)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                rule, position = rule_of(name, arch)
                layer = None if position is None else _global_layer(chunk, position)
                value = rule.packing.read(mapped, hf_names(rule, layer), arch, t, parallel.tp)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{name}: read {tuple(value.shape)}, the model has {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)


def check_source(reader: SafetensorsReader, arch: Architecture, where: str) -> None:
    """The checkpoint holds every tensor of `arch` (its own depth) in the right shape, and no layer holds
    another.

    Raises UserError listing every missing, every misshapen and every unknown tensor.
    """
    problems = Problems()
    shapes = hf_shapes(arch)
    for name, shape in shapes.items():
        info = reader.infos.get(name)
        if info is None:
            problems.add(f"{name} is missing")
        elif tuple(info.shape) != shape:
            problems.add(f"{name} has shape {list(info.shape)}; config.json says {list(shape)}")
    # Old Llama checkpoints carry rotary frequencies, which follow from the config.
    known = shapes.keys() | {name for name in reader.infos if name.endswith(".rotary_emb.inv_freq")}
    unknown = [name for name in reader.infos if name not in known and split_layer(name)[0] is not None]
    for name in unknown[:8]:
        problems.add(f"{name} is not part of a {arch.family} layer (model/families.py), and would be lost")
    if len(unknown) > 8:
        problems.add(f"... and {len(unknown) - 8} more")
    problems.raise_if_any(where)


def _global_layer(chunk: nn.Module, position: int) -> int:
    return chunk.decoder.layers[position].layer_number - 1


def _tensor_parallel_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank()
