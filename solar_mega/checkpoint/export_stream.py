"""Megatron checkpoint -> Hugging Face directory on disk, one parameter at a time, without a model.

Each parameter is put together from its pieces, unpacked, and its tensors are written to their place in
pre-planned shards. Memory: a few copies of the largest parameter.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solar_mega import __version__
from solar_mega.artifact.digest import tensor_digest, weights_hash
from solar_mega.artifact.layer_source import MappedSource
from solar_mega.artifact.progress import ProgressFactory
from solar_mega.artifact.safetensors_format import dtype_name
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.checkpoint.sharing import my_share, shared_directory, together
from solar_mega.checkpoint.tensors import cast_to
from solar_mega.checkpoint.to_hf import write_surroundings
from solar_mega.checkpoint.views import MegatronView, read_whole
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.files import sync_file
from solar_mega.runtime.partial import Partial, SideJobs, fingerprint


@dataclass(frozen=True)
class Export:
    """What to make. `base` is the checkpoint's architecture, `arch` the one at the depth of `layer_map`."""

    source: Path
    target: Path
    side_files: Path
    base: Architecture
    arch: Architecture
    layer_map: LayerMap
    dtype: torch.dtype
    shard_bytes: int


def export_stream(job: Export, about: dict[str, Any], progress: ProgressFactory) -> None:
    """Writes `job.target`. Collective over all ranks, which share the shards.

    Args:
        about: lineage to note; gets the hash of the weights.

    Raises UserError: a damaged checkpoint, values that the dtype cannot hold, a full disk.
    """
    shapes = hf_shapes(job.arch)
    name = dtype_name(job.dtype)
    with shared_directory(job.target, _identity(job)) as partial:
        done = partial.done()
        with together():
            if ranks.is_main():
                partial.clean(keep=done.keys())
        writer = ShardedWriter(partial.path, job.shard_bytes)
        writer.plan([(tensor, name, shape) for tensor, shape in shapes.items()])
        with together():
            _write_shards(job, writer, partial, done, progress)
        with together():
            if ranks.is_main():
                with writer:  # headers and index
                    writer.select(())
                notes = partial.done()
                digests = {tensor: digest for file in writer.files for tensor, digest in notes[file].items()}
                about = {**about, "weights_hash": weights_hash(digests)}
                write_surroundings(partial.path, job.arch, job.side_files, job.dtype, about)


def _write_shards(
    job: Export, plan: ShardedWriter, partial: Partial, done: dict[str, Any], progress: ProgressFactory
) -> None:
    """This rank's shards, each noted as done when it is on the disk."""
    todo = my_share([file for file in plan.files if file not in done])
    nbytes = {file: sum(plan.infos[tensor].nbytes for tensor in plan.names(file)) for file in plan.files}
    alone = ranks.world_size() == 1
    total = sum(nbytes.values()) if alone else sum(nbytes[file] for file in todo)
    before = sum(nbytes[file] for file in done if file in nbytes) if alone else 0

    def to_disk(file: str, digests: dict[str, Any]) -> None:
        sync_file(partial.path / file)
        partial.finish(file, {tensor: digest.result() for tensor, digest in digests.items()})

    with (
        CheckpointTensors(job.source) as stored,
        SideJobs() as beside,
        progress(total, "bytes", "convert", before) as line,
        ShardedWriter(partial.path, job.shard_bytes) as writer,
    ):
        mapped = MappedSource(MegatronView(stored, job.base), job.layer_map)
        writer.plan([(info.name, info.dtype, info.shape) for info in plan.infos.values()])
        writer.select(todo)
        for file in todo:
            digests = {}
            for tensor in plan.names(file):
                value = cast_to(read_whole(mapped, tensor, plan.infos[tensor].shape), job.dtype, tensor)
                digests[tensor] = beside.submit(tensor_digest, value)
                writer.write(tensor, value)
                line.advance(plan.infos[tensor].nbytes)
            beside.submit(to_disk, file, digests)
        writer.leave()


def _identity(job: Export) -> dict[str, Any]:
    return {
        "route": "megatron to hf",
        "version": __version__,
        "source": str(job.source.resolve()),
        "files": fingerprint(job.source),
        "layer_map": job.layer_map.to_json(),
        "dtype": str(job.dtype),
        "shard_bytes": job.shard_bytes,
    }
