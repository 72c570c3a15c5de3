"""The ranks -> a Hugging Face directory, one parameter at a time.

Rank 0 plans the files from the architecture alone, then receives each parameter's tensor-parallel shards
from the stage that owns it, unpacks them and streams the tensors to disk. Memory: one parameter on rank 0,
nothing elsewhere.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solar_mega.artifact.hf import HFDirectory, write_config
from solar_mega.artifact.lineage import LINEAGE, Parent, write_lineage
from solar_mega.artifact.safetensors_format import dtype_name, tensor_bytes
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.checkpoint.names import EMBEDDING, LAYER_PREFIX, Rule, hf_names, hf_shapes, model_rules
from solar_mega.config.schema import ParallelConfig
from solar_mega.config.units import parse_bytes
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import layers_of_chunk
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.files import atomic_directory, require_empty, require_space

_SPARE = 16 << 20  # bytes beyond the weights: headers, index, tokenizer, config


def export_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    parallel: ParallelConfig,
    destination: Path,
    side_files: Path,
    dtype: torch.dtype,
    shard_size: str | int,
    lineage: dict[str, Any],
) -> None:
    """Write the model as a Hugging Face directory that transformers loads. Collective over all ranks.

    `destination` appears only when complete. It may be absent, empty, or an earlier export (it has a
    lineage.json), which is replaced.

    Args:
        chunks: the model's chunks of this rank, plain or under DDP.
        arch: architecture at the model's depth; its `hf_config` becomes config.json.
        side_files: directory whose tokenizer, generation settings and licence travel along.
        dtype: dtype on disk; each value is cast once, to nearest.
        shard_size: largest file, such as "5GB" (transformers' `max_shard_size`) or a number of bytes.
        lineage: `stage`, `parent` (path), `layer_map` (JSON or None), and anything else that fits in JSON.

    Raises:
        UserError: destination not empty, too little space, disk full.
    """
    shard_bytes = parse_bytes(str(shard_size), "output.shard_size")
    with contextlib.ExitStack() as stack:
        place, error = None, None
        if ranks.is_main():
            try:
                sizes = [tensor_bytes(dtype_name(dtype), shape) for shape in hf_shapes(arch).values()]
                require_space(destination, sum(sizes) + _SPARE)
                place = stack.enter_context(_replacing(Path(destination)))
            except Exception as raised:
                error = raised
        ranks.agree(error)
        write_tensors(chunks, arch, parallel, place, dtype, shard_bytes)
        if place is not None:
            write_surroundings(place, arch, side_files, dtype, lineage)
    dist.barrier(group=ranks.control_group())


def write_tensors(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    parallel: ParallelConfig,
    directory: Path | None,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write the model's weights as safetensors into `directory` (existing, rank 0's). Collective over all
    ranks.

    Args:
        dtype: dtype on disk; each value is cast once.
        shard_bytes: largest file.
    """
    ranks.control_group()  # made by all ranks together, before some of them send
    parameters = [dict(_unwrapped(chunk).named_parameters()) for chunk in chunks]
    with contextlib.ExitStack() as stack:
        writer = None
        if ranks.is_main():
            writer = stack.enter_context(ShardedWriter(directory, shard_bytes))
            writer.plan([(name, dtype_name(dtype), shape) for name, shape in hf_shapes(arch).items()])
        for rule, layer in model_rules(arch):
            shards = _gather(parameters, arch, parallel, rule, layer)
            if writer is not None:
                tensors = rule.packing.unpack(shards, arch)
                for name, tensor in zip(hf_names(rule, layer), tensors, strict=True):
                    writer.write(name, tensor.to(dtype))


def write_surroundings(
    place: Path, arch: Architecture, side_files: Path, dtype: torch.dtype, lineage: dict[str, Any]
) -> None:
    """Everything of an export but its weights: config.json, side files, lineage.json. Arguments as
    `export_hf`."""
    config = {key: value for key, value in arch.hf_config.items() if key != "torch_dtype"}
    write_config(place, {**config, "dtype": str(dtype).removeprefix("torch.")})
    if (Path(side_files) / "config.json").exists():
        HFDirectory(side_files).copy_side_files(place)
    about = dict(lineage)
    stage, parent, layer_map = (
        about.pop("stage", "export"),
        about.pop("parent", None),
        about.pop("layer_map", None),
    )
    write_lineage(
        place,
        stage,
        [parent_of(Path(parent))] if parent else [],
        None if layer_map is None else LayerMap.from_json(layer_map),
        about,
    )


def parent_of(path: Path) -> Parent:
    """What a lineage says of a directory. A Megatron checkpoint is known by its run_state.json, which lists
    its files: hashing its optimizer states would read many times the model."""
    if not path.is_dir():
        return Parent(str(path), "unknown: the directory is gone")
    state = path / "run_state.json"
    if not state.exists():
        return Parent.of(path)
    import hashlib

    return Parent(str(path.absolute()), f"run_state:sha256:{hashlib.sha256(state.read_bytes()).hexdigest()}")


@contextlib.contextmanager
def _replacing(destination: Path) -> Iterator[Path]:
    """`atomic_directory`, which also takes the place of an earlier export."""
    if not (destination / LINEAGE).exists():
        require_empty(destination, "the export's destination")
        with atomic_directory(destination) as place:
            yield place
        return
    fresh = destination.with_name(f".{destination.name}.new")
    old = destination.with_name(f".{destination.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with atomic_directory(fresh) as place:
        yield place
    destination.rename(old)
    fresh.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _unwrapped(chunk: nn.Module) -> nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _gather(
    parameters: Sequence[dict[str, Tensor]],
    arch: Architecture,
    parallel: ParallelConfig,
    rule: Rule,
    layer: int | None,
) -> list[Tensor]:
    """The parameter's shards in tensor-parallel order on rank 0; empty lists elsewhere."""
    stage, chunk, name = _owner(arch, parallel, rule, layer)
    dp = ranks.world_size() // (parallel.tp * parallel.pp)
    owners = [t + parallel.tp * dp * stage for t in range(parallel.tp)]  # data-parallel rank 0 of the stage
    me = ranks.rank()
    mine = None
    if me in owners:
        mine = parameters[chunk][name].detach().cpu().contiguous()
    if me != 0:
        if mine is not None:
            # Shape and dtype travel with the shard: rank 0 may hold no parameter of this kind to copy them
            # from.
            dist.send(
                torch.tensor([*mine.shape, *[0] * (2 - mine.dim()), _CODES.index(mine.dtype)]), 0, _control()
            )
            dist.send(mine.view(-1).view(torch.uint8), 0, _control())
        return []
    return [mine if owner == 0 else _receive(owner) for owner in owners]


_CODES = (torch.float32, torch.bfloat16, torch.float16)


def _receive(owner: int) -> Tensor:
    header = torch.zeros(3, dtype=torch.int64)
    dist.recv(header, owner, _control())
    rows, columns, code = header.tolist()
    shape, dtype = ((rows, columns) if columns else (rows,)), _CODES[code]
    count = rows * (columns or 1)
    data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    dist.recv(data, owner, _control())
    return data.view(dtype).view(shape)


def _owner(
    arch: Architecture, parallel: ParallelConfig, rule: Rule, layer: int | None
) -> tuple[int, int, str]:
    """(pipeline rank, chunk, parameter name inside the chunk) that holds the parameter."""
    if layer is None:
        if rule is EMBEDDING:
            return 0, 0, rule.megatron
        return parallel.pp - 1, parallel.vpp - 1, rule.megatron
    for stage in range(parallel.pp):
        for chunk in range(parallel.vpp):
            layers = layers_of_chunk(arch.num_layers, parallel, stage, chunk)
            if layer in layers:
                return stage, chunk, f"{LAYER_PREFIX}{layers.index(layer)}.{rule.megatron}"
    raise ValueError(f"layer {layer} is outside the model's {arch.num_layers}")


def _control() -> dist.ProcessGroup:
    return ranks.control_group()
