"""The ranks -> a Hugging Face directory, one parameter at a time.

Rank 0 plans the files from the architecture alone, then receives each parameter's tensor-parallel shards from the
stage that owns it, unpacks them and streams the tensors to disk. Memory: one parameter on rank 0, nothing elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solar_mega.artifact.safetensors_io import ShardedWriter
from solar_mega.checkpoint.names import EMBEDDING, LAYER_PREFIX, Rule, hf_names, hf_shapes, model_rules
from solar_mega.config.schema import ParallelConfig
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import layers_of_chunk
from solar_mega.runtime import parallel as ranks

SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    parallel: ParallelConfig,
    directory: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write the model's weights as safetensors into `directory` (existing, rank 0's). Collective over all ranks.

    Args:
        dtype: dtype on disk; each value is cast once.
        shard_bytes: largest file.
    """
    writer = None
    if ranks.is_main():
        shapes = hf_shapes(arch)
        writer = ShardedWriter(directory, shard_bytes)
        writer.plan([(name, SAFETENSORS_DTYPE[dtype], shape) for name, shape in shapes.items()])
    for rule, layer in model_rules(arch):
        shards = _gather(chunks, arch, parallel, rule, layer)
        if writer is not None:
            tensors = rule.packing.unpack(shards, arch)
            for name, tensor in zip(hf_names(rule, layer), tensors, strict=True):
                writer.write(name, tensor.to(dtype).contiguous())
    if writer is not None:
        writer.close()


def _gather(
    chunks: Sequence[nn.Module], arch: Architecture, parallel: ParallelConfig, rule: Rule, layer: int | None
) -> list[Tensor]:
    """The parameter's shards in tensor-parallel order on rank 0; empty lists elsewhere."""
    stage, chunk, name = _owner(arch, parallel, rule, layer)
    dp = ranks.world_size() // (parallel.tp * parallel.pp)
    owners = [t + parallel.tp * dp * stage for t in range(parallel.tp)]  # data-parallel rank 0 of the stage
    me = ranks.rank()
    mine = None
    if me in owners:
        mine = dict(chunks[chunk].named_parameters())[name].detach().cpu().contiguous()
    if me != 0:
        if mine is not None:
            # Shape and dtype travel with the shard: rank 0 may hold no parameter of this kind to copy them from.
            dist.send(torch.tensor([*mine.shape, *[0] * (2 - mine.dim()), _CODES.index(mine.dtype)]), 0, _control())
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
