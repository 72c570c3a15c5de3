"""Proof that a Megatron checkpoint holds a Hugging Face directory's weights through a layer map, bit for bit.

Read one parameter at a time, whole, straight from the files: no model, no process groups, and none of the
code that loads checkpoints for training.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.progress import ProgressFactory, silent
from solar_mega.artifact.safetensors_format import dtype_name, torch_dtype
from solar_mega.artifact.verify import Difference, VerifyReport
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes, model_rules
from solar_mega.checkpoint.run_state import check_files
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture

# Checkpoint keys as Transformer Engine spells them; the model's own names differ only here.
_STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def verify_megatron(
    src: HFDirectory,
    checkpoint: Path,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
) -> VerifyReport:
    """Compares every weight of `checkpoint` with `src` through `layer_map`, up to the first difference.

    Args:
        dtype: what the weights were cast to on the way (safetensors spelling), if they were.

    Raises UserError: the source or the map is not usable. Damage to the checkpoint is reported, not raised.
    """
    base = Architecture.from_hf(src.config, f"{src.path}/config.json")
    arch = base.grown(layer_map)
    try:
        check_files(checkpoint)
        stored = _Stored(checkpoint)
    except UserError as error:
        return VerifyReport(0, 0, (str(error),))
    structure = _structure(src, stored, arch, layer_map, dtype)
    tensors = nbytes = 0
    with progress(sum(stored.nbytes(key) for key in stored.weights), "bytes", "verify") as line:
        for rule, layer in model_rules(arch):
            key = _key(rule, layer)
            if key not in stored.weights:
                continue
            parts = rule.packing.unpack([stored.read(key)], arch)
            origin = None if layer is None else layer_map[layer]
            for target, name, found in zip(hf_names(rule, layer), hf_names(rule, origin), parts, strict=True):
                difference = _compare(src, name, target, found)
                if difference is not None:
                    return VerifyReport(tensors, nbytes, structure, difference)
                tensors, nbytes = tensors + 1, nbytes + found.numel() * found.element_size()
            line.advance(stored.nbytes(key))
    return VerifyReport(tensors, nbytes, structure)


class _Stored:
    """The weights of a checkpoint by key."""

    def __init__(self, path: Path) -> None:
        from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
            CachedMetadataFileSystemReader,
        )
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.reader = CachedMetadataFileSystemReader(str(path))
        try:
            entries = self.reader.read_metadata().state_dict_metadata
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(
                f"{path / '.metadata'} cannot be read ({type(error).__name__}: {error})"
            ) from error
        self.weights: dict[str, Any] = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def nbytes(self, key: str) -> int:
        return self.weights[key].size.numel() * self.weights[key].properties.dtype.itemsize

    def read(self, key: str) -> Tensor:
        import torch.distributed.checkpoint as distributed_checkpoint

        tensor = torch.empty(self.weights[key].size, dtype=self.weights[key].properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no process groups
            distributed_checkpoint.load({key: tensor}, storage_reader=self.reader, no_dist=True)
        return tensor


def _key(rule: Rule, layer: int | None) -> str:
    if layer is None:
        return rule.megatron
    return f"decoder.layers.{layer}.{_STORED.get(rule.megatron, rule.megatron)}"


def _structure(
    src: HFDirectory, stored: _Stored, arch: Architecture, layer_map: LayerMap, dtype: str | None
) -> tuple[str, ...]:
    """Keys that are missing, extra, or of another dtype than the source's (or the one asked for)."""
    texts = []
    wanted: set[str] = set()
    shapes = hf_shapes(arch)
    for rule, layer in model_rules(arch):
        key, origin = _key(rule, layer), None if layer is None else layer_map[layer]
        wanted.add(key)
        if key not in stored.weights:
            texts.append(f"{key} is missing")
            continue
        entry = stored.weights[key]
        elements = sum(torch.Size(shapes[name]).numel() for name in hf_names(rule, layer))
        if entry.size.numel() != elements:
            texts.append(f"{key} has shape {list(entry.size)}, expected {elements} elements")
        expected = torch_dtype(dtype or src.tensors.info(hf_names(rule, origin)[0]).dtype)
        if entry.properties.dtype != expected:
            texts.append(f"{key} is {dtype_name(entry.properties.dtype)}, expected {dtype_name(expected)}")
    texts += [
        f"{key} is extra: nothing in the source maps to it" for key in stored.weights if key not in wanted
    ]
    return tuple(texts)


def _compare(src: HFDirectory, name: str, target: str, found: Tensor) -> Difference | None:
    expected = src.tensors.read(name).to(found.dtype)
    if expected.shape != found.shape:
        return Difference(target, name, (), str(list(expected.shape)), str(list(found.shape)))
    # Bits, not values: NaN equals itself and -0 differs from 0.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    unequal = expected.contiguous().view(bits) != found.contiguous().view(bits)
    if not unequal.any():
        return None
    index = tuple(int(i) for i in unequal.nonzero()[0])
    return Difference(target, name, index, f"{expected[index].item():g}", f"{found[index].item():g}")
