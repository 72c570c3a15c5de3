"""Hugging Face <-> Megatron on disk, by way of the model: the ranks build it, fill it and write it in the
other form. Memory: the model, shared by the ranks.

A Megatron checkpoint can be loaded on any layout, so the layout here is a matter of memory only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.source import Source
from solar_mega.config.schema import ParallelConfig, Precision
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_bytes, human_count, say
from solar_mega.runtime.files import require_empty

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Conversion:
    """What to convert into what. `layer_map` as the user spelled it; `dtype` None keeps the source's."""

    source: Source
    target: Path
    to: Literal["hf", "megatron"]
    layer_map: str
    dtype: Literal["fp32", "bf16", "fp16"] | None
    shard_bytes: int
    tp: int
    pp: int


def run(job: Conversion, dry_run: bool) -> int:
    """Checks everything, then converts; every rank of the world calls this. Returns the exit code.

    Raises UserError: unsupported architecture, a map or layout that does not fit it, missing or misshapen
    tensors, target not empty, wrong world size, full disk.
    """
    from solar_mega.checkpoint.from_hf import check_source

    source = job.source
    base = Architecture.from_hf(source.config, f"{source.path}/config.json")
    layer_map = LayerMap.parse(job.layer_map, base.num_layers)
    arch = base.grown(layer_map)
    parallel = ParallelConfig(tp=job.tp, pp=job.pp)
    check_layout(arch, parallel).raise_if_any("--tp and --pp")
    if job.to == "megatron" and job.dtype == "fp16":
        raise UserError("--dtype fp16 is for Hugging Face directories; Megatron checkpoints are fp32 or bf16")
    if source.kind == "hf":
        check_source(HFDirectory(source.path).tensors, base, str(source.path))
    require_empty(job.target, "DST")
    say(layer_map.describe())
    size = arch.parameters() * _WIDTH[job.dtype or source.precision]
    what = f"{arch.num_layers} layers, {human_count(arch.parameters())} parameters, {human_bytes(size)}"
    if dry_run:
        say(f"would write {job.target}: {what}")
        return 0
    ranks.check_world_size(parallel, ranks.world_size())
    with ranks.running(parallel):
        _convert(job, base, arch, layer_map, parallel)
    say(f"{job.target}: {what}")
    return 0


def _convert(
    job: Conversion, base: Architecture, arch: Architecture, layer_map: LayerMap, parallel: ParallelConfig
) -> None:
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.megatron import load_checkpoint
    from solar_mega.model.builder import build_model

    source = job.source
    precision: Precision = source.precision
    if job.to == "megatron" and job.dtype in ("fp32", "bf16"):
        precision = job.dtype
    chunks = build_model(arch, parallel, precision)
    if source.kind == "hf":
        load_weights(chunks, HFDirectory(source.path).tensors, base, layer_map, parallel)
    else:
        load_checkpoint(source.path, chunks, None, layer_map)
    lineage = {
        "stage": "convert",
        "parent": str(source.path.resolve()),
        "layer_map": layer_map.to_json(),
        "dtype": job.dtype or source.precision,
    }
    if job.to == "hf":
        _write_hf(job, arch, parallel, chunks, lineage)
    else:
        _write_megatron(job, arch, parallel, chunks, lineage)


def _write_hf(
    job: Conversion, arch: Architecture, parallel: ParallelConfig, chunks: list, lineage: dict
) -> None:
    import torch

    from solar_mega.checkpoint.to_hf import export_hf

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    export_hf(
        chunks,
        arch,
        parallel,
        job.target,
        side_files=job.source.side_files,
        dtype=dtypes[job.dtype or job.source.precision],
        shard_size=job.shard_bytes,
        lineage=lineage,
    )


def _write_megatron(
    job: Conversion, arch: Architecture, parallel: ParallelConfig, chunks: list, lineage: dict
) -> None:
    """`target/step-00000000` and `target/latest`: weights without a run; training starts from them."""
    from solar_mega.checkpoint.megatron import RunState, save_checkpoint
    from solar_mega.checkpoint.store import CheckpointStore

    # What the weights are now: exports keep it unless told otherwise.
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[job.dtype or job.source.precision]
    config = {key: value for key, value in arch.hf_config.items() if key != "torch_dtype"}
    state = RunState(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        schedule={},
        hf_config={**config, "dtype": dtype},
        config_toml="",
        parallel={"tp": parallel.tp, "pp": parallel.pp, "vpp": 1},
        source=str(job.source.side_files.resolve()),
        lineage=lineage,
    )
    save_checkpoint(CheckpointStore(job.target), chunks, None, state)
