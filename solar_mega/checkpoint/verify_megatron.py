"""Proof that a Megatron checkpoint and what it was made from, or what was made from it, hold the same weights
through a layer map, bit for bit.

Read one tensor at a time straight from the files: no model, no process groups, and none of the code that
loads checkpoints for training. Two Megatron checkpoints are compared with their optimizer states.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from solar_mega.artifact.cast import cast
from solar_mega.artifact.hf import HFDirectory, grown_config
from solar_mega.artifact.layer_source import MappedSource
from solar_mega.artifact.progress import ProgressFactory, silent
from solar_mega.artifact.safetensors_format import dtype_name, tensor_bytes, torch_dtype
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.verify import Difference, VerifyReport, config_differences
from solar_mega.checkpoint.from_hf import check_source
from solar_mega.checkpoint.items import STATES, CheckpointTensors, per_layer
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.checkpoint.remap_plan import Plan, Remap
from solar_mega.checkpoint.run_state import RUN_STATE, check_files, read_run_state
from solar_mega.checkpoint.views import MegatronView, read_whole
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture

_View = SafetensorsReader | MegatronView


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
    base = Architecture.from_hf(src.config, f"{src.path}/config.json")
    check_source(src.tensors, base, str(src.path))
    arch = base.grown(layer_map)
    try:
        structure = _check_ours(checkpoint, dict(arch.hf_config))
        stored = CheckpointTensors(checkpoint)
    except UserError as error:
        return VerifyReport(0, 0, (str(error),))
    with stored:
        found = MegatronView(stored, arch)
        structure += found.problems()
        return _compare(src.tensors, found, arch, layer_map, dtype, structure, False, progress)


def verify_export(
    checkpoint: Path,
    dst: HFDirectory,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
    hf_config: dict | None = None,
) -> VerifyReport:
    """Compares every weight of `dst`, made from `checkpoint` through `layer_map`, up to the first difference.

    Args and errors as `verify_import`, with the roles exchanged. `hf_config` is for a checkpoint that another
    Megatron program wrote.
    """
    config = hf_config or read_run_state(checkpoint).hf_config
    base = Architecture.from_hf(config, f"{checkpoint}/run_state.json")
    arch = base.grown(layer_map)
    if (checkpoint / RUN_STATE).is_file():
        check_files(checkpoint)
    with CheckpointTensors(checkpoint) as stored:
        source = MegatronView(stored, base)
        source.check()
        structure = config_differences(dict(arch.hf_config), dst.config)
        try:
            check_source(dst.tensors, arch, str(dst.path))
        except UserError as error:
            return VerifyReport(0, 0, (*structure, str(error)))
        extra = dst.tensors.infos.keys() - hf_shapes(arch).keys()
        structure += [f"{name} is extra: nothing in the checkpoint maps to it" for name in sorted(extra)]
        return _compare(source, dst.tensors, arch, layer_map, dtype, structure, True, progress)


def _check_ours(checkpoint: Path, expected: dict) -> list[str]:
    """Damage raises; differences of the config are returned. Nothing to check in others' checkpoints."""
    if not (checkpoint / RUN_STATE).is_file():
        return []
    check_files(checkpoint)
    return config_differences(expected, read_run_state(checkpoint).hf_config)


def _compare(
    source: _View,
    found: _View,
    arch: Architecture,
    layer_map: LayerMap,
    dtype: str | None,
    structure: list[str],
    any_dtype: bool,
    progress: ProgressFactory,
) -> VerifyReport:
    """All tensors of `found` with what the map makes of `source`, by Hugging Face name."""
    broken = {text.split(" ", 1)[0] for text in structure}
    shapes, sound = hf_shapes(arch), {}
    mapped = MappedSource(source, layer_map)
    for name in shapes:
        if name in broken or isinstance(found, MegatronView) and found.key(name) in broken:
            continue
        kind = found.info(name).dtype
        origin = kind if any_dtype else _source_dtype(source, layer_map, name)
        if kind != (dtype or origin):
            structure.append(f"{name} is {kind}, expected {dtype or origin}")
        else:
            sound[name] = tensor_bytes(kind, shapes[name])
    tensors = nbytes = 0
    with progress(sum(sound.values()), "bytes", "verify") as line:
        for name, size in sound.items():
            try:
                mine = found.read(name)
            except UserError as error:
                return VerifyReport(tensors, nbytes, (*structure, str(error)))
            expected = read_whole(mapped, name, shapes[name])
            kind = dtype_name(mine.dtype)
            expected = expected if expected.dtype == mine.dtype else cast(expected, kind, name)
            difference = _difference(name, _origin(name, source, layer_map), expected, mine)
            if difference is not None:
                return VerifyReport(tensors, nbytes, tuple(structure), difference)
            tensors, nbytes = tensors + 1, nbytes + size
            line.advance(size)
    return VerifyReport(tensors, nbytes, tuple(structure))


def _origin_name(name: str, layer_map: LayerMap) -> str:
    from solar_mega.artifact.hf import layer_name, split_layer

    target, suffix = split_layer(name)
    return name if target is None else layer_name(layer_map.sources_of(target)[0], suffix)


def _source_dtype(source: _View, layer_map: LayerMap, name: str) -> str:
    return source.info(_origin_name(name, layer_map)).dtype


def _origin(name: str, source: _View, layer_map: LayerMap) -> str:
    """What a person looks for in the source."""
    origin = _origin_name(name, layer_map)
    return source.key(origin) if isinstance(source, MegatronView) else origin


def verify_remapped(
    src: Path,
    dst: Path,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
    config: dict | None = None,
) -> VerifyReport:
    """Compares two Megatron checkpoints through `layer_map`: all weights, and optimizer states where `dst`
    has them, up to the first difference.

    Args:
        config: config.json of `src`; None when it is another program's checkpoint.

    Raises UserError: the source or the map is not usable. Damage to `dst` is reported, not raised.
    """
    if (src / RUN_STATE).is_file():
        check_files(src)
    try:
        grown = {} if config is None else grown_config(config, layer_map)
        structure = _check_ours(dst, grown)
        found = CheckpointTensors(dst)
    except UserError as error:
        return VerifyReport(0, 0, (str(error),))
    with CheckpointTensors(src) as source, found:
        job = Remap(src, dst, layer_map, grown if config else None, config, optimizer=bool(found.states))
        pairs = list(_pairs(Plan(job, source), source, found, layer_map, structure))
        tensors = nbytes = 0
        with progress(sum(found.tensors[key].nbytes for key, _ in pairs), "bytes", "verify") as line:
            for key, expected in pairs:
                try:
                    mine = found.read(key)
                except UserError as error:
                    return VerifyReport(tensors, nbytes, (*structure, str(error)))
                origin, right = expected()
                wanted = dtype if dtype and not key.startswith(STATES) else dtype_name(right.dtype)
                if mine.dtype != torch_dtype(wanted):
                    structure.append(f"{key} is {dtype_name(mine.dtype)}, expected {wanted}")
                    continue
                right = right if right.dtype == mine.dtype else cast(right, wanted, key)
                difference = _difference(key, origin, right, mine)
                if difference is not None:
                    return VerifyReport(tensors, nbytes, tuple(structure), difference)
                tensors, nbytes = tensors + 1, nbytes + found.tensors[key].nbytes
                line.advance(found.tensors[key].nbytes)
    return VerifyReport(tensors, nbytes, tuple(structure))


def _pairs(
    plan: Plan, source: CheckpointTensors, found: CheckpointTensors, layer_map: LayerMap, structure: list[str]
) -> Iterator:
    """(key in the target, function giving (source key, expected tensor)); what does not pair up goes to
    `structure`."""
    expected = {}
    for key in source.tensors:
        if key.startswith(STATES) and not found.states:
            continue
        layer = per_layer(key)
        if layer is None:
            expected[key] = key
            continue
        for g in range(len(layer_map)):
            if layer_map.sources_of(g)[:1] == (layer[1],):
                expected[f"{layer[0]}{g}.{layer[2]}"] = key
    for key, origin in expected.items():
        mine = found.tensors.get(key)
        if mine is None:
            structure.append(f"{key} is missing (source {origin})")
        elif mine.shape != source.tensors[origin].shape:
            structure.append(
                f"{key} has shape {list(mine.shape)}, expected {list(source.tensors[origin].shape)}"
            )
        else:
            place, shape = plan.place_of_made(key), mine.shape
            if place is not None:
                yield key, lambda place=place, shape=shape, origin=origin: (origin, plan.make(place, shape))
            else:
                yield key, lambda origin=origin: (origin, source.read(origin))
    structure += [
        f"{key} is extra: nothing in the source maps to it" for key in found.tensors if key not in expected
    ]


def _difference(name: str, source: str, expected: Tensor, found: Tensor) -> Difference | None:
    """The first element whose bits differ: NaN equals itself, and -0 is not 0."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    left, right = expected.contiguous().view(bits), found.contiguous().view(bits)
    if torch.equal(left, right):
        return None
    index = tuple(int(i) for i in (left != right).nonzero()[0])
    return Difference(name, source, index, f"{expected[index].item():g}", f"{found[index].item():g}")
