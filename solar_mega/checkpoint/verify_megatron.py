"""Proof that a Megatron checkpoint and a Hugging Face directory hold the same weights through a layer map,
bit for bit, whichever of the two was made from the other.

Read one parameter at a time, whole, straight from the files: no model, no process groups, and none of the
code that loads checkpoints for training.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.progress import ProgressFactory, silent
from solar_mega.artifact.safetensors_format import dtype_name, torch_dtype
from solar_mega.artifact.verify import Difference, VerifyReport
from solar_mega.checkpoint.from_hf import check_source
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes, model_rules
from solar_mega.checkpoint.run_state import check_files, read_run_state
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture

# Checkpoint keys as Transformer Engine spells them; the model's own names differ only here.
_STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

_Layer = int | None
_Pair = tuple[Rule, _Layer, _Layer]
"""A parameter, its layer in the checkpoint and its layer in the Hugging Face directory."""


def verify_import(
    src: HFDirectory,
    checkpoint: Path,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
) -> VerifyReport:
    """Compares every weight of `checkpoint`, made from `src` through `layer_map`, up to the first difference.

    Args:
        dtype: what the weights were cast to on the way (safetensors spelling), if they were.

    Raises UserError: the source or the map is not usable. Damage to the checkpoint is reported, not raised.
    """
    if layer_map.changed:
        raise UserError(f'layer map "{layer_map}" changes layers; verify the Hugging Face result instead')
    base = Architecture.from_hf(src.config, f"{src.path}/config.json")
    check_source(src.tensors, base, str(src.path))
    arch = base.grown(layer_map)
    try:
        check_files(checkpoint)
        stored = _Stored(checkpoint)
    except UserError as error:
        return VerifyReport(0, 0, (str(error),))
    pairs = [(rule, layer, None if layer is None else layer_map[layer]) for rule, layer in model_rules(arch)]
    structure = []
    for rule, layer, origin in pairs:
        dtype_of_source = src.tensors.info(hf_names(rule, origin)[0]).dtype
        structure += stored.problems(rule, layer, arch, dtype or dtype_of_source)
    wanted = {_key(rule, layer) for rule, layer, _ in pairs}
    extra = [key for key in stored.weights if key not in wanted]
    structure += [f"{key} is extra: nothing in the source maps to it" for key in extra]

    def compare(tensor: Tensor, rule: Rule, layer: _Layer, origin: _Layer, part: int) -> Difference | None:
        name = hf_names(rule, origin)[part]
        return _difference(hf_names(rule, layer)[part], name, src.tensors.read(name).to(tensor.dtype), tensor)

    return _walk(stored, pairs, arch, compare, tuple(structure), progress)


def verify_export(
    checkpoint: Path,
    dst: HFDirectory,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
) -> VerifyReport:
    """Compares every weight of `dst`, made from `checkpoint` through `layer_map`, up to the first difference.

    Args and errors as `verify_import`, with the roles exchanged.
    """
    if layer_map.changed:
        raise UserError(f'layer map "{layer_map}" changes layers; verify the Hugging Face result instead')
    base = Architecture.from_hf(read_run_state(checkpoint).hf_config, f"{checkpoint}/run_state.json")
    arch = base.grown(layer_map)
    check_files(checkpoint)
    stored = _Stored(checkpoint)
    structure = []
    for rule, layer in model_rules(base):
        structure += stored.problems(rule, layer, base, None)
    try:
        check_source(dst.tensors, arch, str(dst.path))
        extra = dst.tensors.infos.keys() - hf_shapes(arch).keys()
        structure += [f"{name} is extra: nothing in the checkpoint maps to it" for name in sorted(extra)]
    except UserError as error:
        return VerifyReport(0, 0, (*structure, str(error)))
    for name, info in dst.tensors.infos.items():
        if dtype is not None and info.dtype != dtype:
            structure.append(f"{name} is {info.dtype}, expected {dtype}")
    pairs = [(rule, None if layer is None else layer_map[layer], layer) for rule, layer in model_rules(arch)]

    def compare(tensor: Tensor, rule: Rule, origin: _Layer, layer: _Layer, part: int) -> Difference | None:
        name = hf_names(rule, layer)[part]
        found = dst.tensors.read(name)
        return _difference(name, _key(rule, origin), tensor.to(found.dtype), found)

    return _walk(stored, pairs, arch, compare, tuple(structure), progress)


def _walk(
    stored: "_Stored",
    pairs: list[_Pair],
    arch: Architecture,
    compare: Callable[..., Difference | None],
    structure: tuple[str, ...],
    progress: ProgressFactory,
) -> VerifyReport:
    tensors = nbytes = 0
    broken = {text.split(" ", 1)[0] for text in structure}
    sound = [pair for pair in pairs if _key(pair[0], pair[1]) not in broken]
    total = sum(stored.nbytes(_key(rule, layer)) for rule, layer, _ in sound)
    with progress(total, "bytes", "verify") as line:
        for rule, layer, other in sound:
            for part, tensor in enumerate(rule.packing.unpack([stored.read(_key(rule, layer))], arch)):
                difference = compare(tensor, rule, layer, other, part)
                if difference is not None:
                    return VerifyReport(tensors, nbytes, structure, difference)
                tensors, nbytes = tensors + 1, nbytes + tensor.numel() * tensor.element_size()
            line.advance(stored.nbytes(_key(rule, layer)))
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

    def problems(self, rule: Rule, layer: int | None, arch: Architecture, dtype: str | None) -> Iterator[str]:
        """What is wrong with a parameter before its bits are looked at. `dtype` None allows any."""
        key, shapes = _key(rule, layer), hf_shapes(arch)
        if key not in self.weights:
            yield f"{key} is missing"
            return
        entry = self.weights[key]
        elements = sum(torch.Size(shapes[name]).numel() for name in hf_names(rule, layer))
        if entry.size.numel() != elements:
            yield f"{key} has shape {list(entry.size)}, expected {elements} elements"
        if dtype is not None and entry.properties.dtype != torch_dtype(dtype):
            yield f"{key} is {dtype_name(entry.properties.dtype)}, expected {dtype}"


def _key(rule: Rule, layer: int | None) -> str:
    if layer is None:
        return rule.megatron
    return f"decoder.layers.{layer}.{_STORED.get(rule.megatron, rule.megatron)}"


def _difference(name: str, source: str, expected: Tensor, found: Tensor) -> Difference | None:
    """The first element whose bits differ: NaN equals itself, and -0 is not 0."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    unequal = expected.contiguous().view(bits) != found.contiguous().view(bits)
    if not unequal.any():
        return None
    index = tuple(int(i) for i in unequal.nonzero()[0])
    return Difference(name, source, index, f"{expected[index].item():g}", f"{found[index].item():g}")
