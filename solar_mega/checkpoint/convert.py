"""Conversions that read or write a Megatron checkpoint on disk: which route, whether it can work, and doing
it.

    Hugging Face -> Megatron    checkpoint.import_hf        one parameter at a time, for any TP and PP
    Megatron -> Hugging Face    checkpoint.export_stream    likewise, from any layout
    Megatron -> Megatron        checkpoint.remap_files      links or copies, optimizer states included

No route builds a model or needs a GPU. Processes started by torchrun share the work.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.progress import ProgressFactory
from solar_mega.checkpoint.source import Source
from solar_mega.config.schema import ParallelConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.runtime.console import human_bytes, human_count, say
from solar_mega.runtime.files import free_bytes, require_empty, require_space
from solar_mega.runtime.garbage import small_heap
from solar_mega.runtime.partial import left_behind

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_SPARE = 16 << 20  # bytes beyond the weights: headers, index, tokenizer, config
_IMPORTS = 400 << 20  # resident bytes of the interpreter with torch
_COPIES = 6  # of the largest parameter: read, packed, cut, cast, hashed, being written


@dataclass(frozen=True)
class Conversion:
    """What to convert into what. `layer_map` as the user spelled it; `dtype` None keeps the source's.

    `tp` and `pp` are the layout of a checkpoint that is written; any layout loads it.
    """

    source: Source
    target: Path
    to: Literal["hf", "megatron"]
    layer_map: str
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    shard_bytes: int = 5 * 10**9
    tp: int = 1
    pp: int = 1
    optimizer: Literal["keep", "drop"] = "keep"
    zero_copy: bool = False


@dataclass(frozen=True)
class Sheet:
    """What a conversion will write, known before anything is written."""

    layers: int
    parameters: int | None
    nbytes: int
    memory: int
    """Resident bytes per process, at most."""

    what: str

    def __str__(self) -> str:
        count = "" if self.parameters is None else f"{human_count(self.parameters)} parameters, "
        return f"{self.layers} layers, {count}{human_bytes(self.nbytes)}{self.what}"


def run(job: Conversion, dry_run: bool, progress: ProgressFactory) -> int:
    """Checks everything, then converts; every rank of the world calls this. Returns the exit code.

    Raises UserError: unsupported architecture, a map or layout that does not fit it, missing or misshapen
    tensors, target not empty or inside the source, too little space.
    """
    from solar_mega.checkpoint.sharing import together, world

    require_empty(job.target, "DST")
    if job.source.path.resolve() in job.target.resolve().parents:
        raise UserError(
            f"DST: {job.target} lies inside the source {job.source.path}; name a directory outside it"
        )
    with small_heap(), world():
        with together():
            sheet, work = _prepare(job)
            # What a killed run left is counted as free: it is continued or removed.
            require_space(job.target, sheet.nbytes + _SPARE - left_behind(job.target))
        if dry_run:
            say(
                f"would write {job.target}: {sheet}\n"
                f"free there: {human_bytes(free_bytes(job.target))}; memory: at most about "
                f"{human_bytes(sheet.memory)} per process"
            )
            return 0
        work(progress)
    say(f"{job.target}: {sheet}")
    return 0


def _prepare(job: Conversion):
    """(sheet, work): what will be written, and the function that writes it."""
    if job.source.kind == "megatron" and job.to == "megatron":
        return _remap(job)
    if not job.source.config:
        raise UserError(
            f"{job.source.path} was not written by solar_mega and has no config; give --hf-config DIR, the "
            "Hugging Face directory whose config.json and tokenizer belong to it"
        )
    base = Architecture.from_hf(job.source.config, f"{job.source.path}/config.json")
    layer_map = _read_map(job, base.num_layers)
    arch = base.grown(layer_map)
    largest = max(arch.vocab_size * arch.hidden_size, 2 * arch.ffn_hidden_size * arch.hidden_size)
    width = _WIDTH[job.dtype or job.source.precision]
    memory = _IMPORTS + _COPIES * largest * max(width, _WIDTH[job.source.precision])
    sheet = Sheet(arch.num_layers, arch.parameters(), arch.parameters() * width, memory, "")
    make = _import if job.source.kind == "hf" else _export
    return sheet, make(job, base, arch, layer_map)


def _read_map(job: Conversion, layers: int) -> LayerMap:
    layer_map = LayerMap.parse(job.layer_map, layers)
    if layer_map.fresh:
        raise UserError(
            f'layer map "{layer_map}": target layers {", ".join(map(str, layer_map.fresh[:8]))} are fresh, '
            "and the source has no weights for them; use a map that gives every layer an origin"
        )
    say(layer_map.describe())
    return layer_map


def _import(job: Conversion, base: Architecture, arch: Architecture, layer_map: LayerMap):
    from solar_mega.checkpoint.from_hf import check_source
    from solar_mega.checkpoint.import_hf import Import, import_hf

    parallel = ParallelConfig(tp=job.tp, pp=job.pp)
    check_layout(arch, parallel).raise_if_any("--tp and --pp")
    if job.dtype == "fp16":
        raise UserError("--dtype fp16 is for Hugging Face directories; Megatron checkpoints are fp32 or bf16")
    source = HFDirectory(job.source.path)
    check_source(source.tensors, base, str(job.source.path))
    dtype = _torch_dtype(job.dtype or job.source.precision)
    # A part is what is redone after a kill, and what processes share.
    task = Import(source, job.target, base, arch, layer_map, parallel, dtype, min(job.shard_bytes, 2 * 10**9))
    return lambda progress: import_hf(task, _about(job, layer_map), progress)


def _export(job: Conversion, base: Architecture, arch: Architecture, layer_map: LayerMap):
    from solar_mega.checkpoint.export_stream import Export, export_stream
    from solar_mega.checkpoint.items import CheckpointTensors
    from solar_mega.checkpoint.run_state import RUN_STATE, check_files
    from solar_mega.checkpoint.views import MegatronView

    _refuse_layout(job)
    if (job.source.path / RUN_STATE).is_file():
        check_files(job.source.path)
    with CheckpointTensors(job.source.path) as stored:
        MegatronView(stored, base).check()
    dtype = _torch_dtype(job.dtype or job.source.precision)
    task = Export(
        job.source.path, job.target, job.source.side_files, base, arch, layer_map, dtype, job.shard_bytes
    )
    return lambda progress: export_stream(task, _about(job, layer_map), progress)


def _remap(job: Conversion):
    from solar_mega.artifact.hf import grown_config
    from solar_mega.checkpoint.items import CheckpointTensors
    from solar_mega.checkpoint.remap_plan import Plan, Remap
    from solar_mega.checkpoint.run_state import RUN_STATE, check_files

    _refuse_layout(job)
    ours = (job.source.path / RUN_STATE).is_file()
    if ours:
        check_files(job.source.path)
    stored = CheckpointTensors(job.source.path)
    layer_map = _read_map(job, stored.layers)
    kinds = {held.dtype for held in stored.weights.values()}
    dtype = None if job.dtype is None else _torch_dtype(job.dtype)
    if dtype is not None and kinds == {dtype}:
        dtype = None
    if dtype is not None and job.dtype == "fp16":
        raise UserError("--dtype fp16 is for Hugging Face directories; Megatron checkpoints are fp32 or bf16")
    if dtype is not None and stored.states and job.optimizer == "keep":
        raise UserError(
            f"--dtype {job.dtype} changes the weights, and the optimizer states belong to them as they "
            "are; leave the states out with --optimizer drop"
        )
    if dtype is not None and job.zero_copy:
        raise UserError(f"--zero-copy writes no weights, so --dtype {job.dtype} cannot change them")
    config = job.source.config if ours else None
    task = Remap(
        job.source.path,
        job.target,
        layer_map,
        None if config is None else grown_config(config, layer_map),
        config,
        dtype,
        job.optimizer == "keep",
        job.shard_bytes,
    )
    plan = Plan(task, stored)
    largest = max(held.nbytes for held in stored.tensors.values())
    moved = sum(place.length for place in plan.made) if job.zero_copy else _stored_bytes(plan)
    words = ", links" if job.zero_copy else " (layers with the same bytes share them)"
    sheet = Sheet(len(layer_map), _elements(plan), moved, _IMPORTS + _COPIES * largest, words)
    return sheet, lambda progress: _write_remapped(job, plan, layer_map, progress)


def _stored_bytes(plan: Any) -> int:
    """Of all items that the target needs, each once."""
    return sum(place.length for place in {piece[2] for entry in plan.entries for piece in entry.pieces})


def _elements(plan: Any) -> int:
    from solar_mega.checkpoint.items import STATES

    weights = (
        entry for entry in plan.entries if entry.dtype is not None and not entry.key.startswith(STATES)
    )
    return sum(math.prod(entry.shape) for entry in weights)


def _write_remapped(job: Conversion, plan: Any, layer_map: LayerMap, progress: ProgressFactory) -> None:
    from solar_mega.checkpoint.remap_files import copy, zero_copy
    from solar_mega.checkpoint.sharing import alone

    about = _about(job, layer_map)
    if job.zero_copy:
        if not alone():
            raise UserError("--zero-copy takes milliseconds in one process; start it without torchrun")
        if zero_copy(plan, about):
            return
        say(f"{job.target} cannot hold links to {job.source.path} (another file system?); copying instead")
        require_space(job.target, _stored_bytes(plan) + _SPARE)
    copy(plan, about, progress)


def _about(job: Conversion, layer_map: LayerMap) -> dict[str, Any]:
    return {
        "stage": "convert",
        "parent": str(job.source.path.resolve()),
        "layer_map": layer_map.to_json(),
        "dtype": job.dtype or job.source.precision,
    }


def _refuse_layout(job: Conversion) -> None:
    if (job.tp, job.pp) != (1, 1):
        raise UserError(
            "--tp and --pp are for Megatron checkpoints made of Hugging Face directories; what is stored in "
            "SRC is read from any layout"
        )


def _torch_dtype(name: str):
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
