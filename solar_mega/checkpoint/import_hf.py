"""Hugging Face directory -> Megatron checkpoint on disk, one parameter at a time.

No model is built: each parameter's tensors are read, packed for every tensor-parallel rank, and appended to
the files that a run on the layout would have written. Memory: a few copies of the largest parameter.

    __R_P.distcp     R = t + tp * stage as torchrun numbers ranks without data parallelism, P = part of the
    stage
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solar_mega import __version__
from solar_mega.artifact.digest import tensor_digest, weights_hash
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.layer_source import MappedSource
from solar_mega.artifact.progress import ProgressFactory
from solar_mega.checkpoint.index import IndexBuilder, Place, write_index
from solar_mega.checkpoint.item_format import ItemWriter
from solar_mega.checkpoint.items import extra_state_key, stored_key
from solar_mega.checkpoint.names import EMBEDDING, Rule, hf_names, hf_shapes, model_rules
from solar_mega.checkpoint.sharing import my_share, shared_directory, together
from solar_mega.checkpoint.tensors import Loaded, cast_to, owns_memory, pieces_of, whole_shape
from solar_mega.checkpoint.views import read_whole
from solar_mega.config.schema import ParallelConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import layers_of_chunk
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.partial import Partial, SideJobs, fingerprint

CONTENT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""What training writes about its checkpoints (`checkpoint.megatron`)."""

STEP = "step-00000000"


@dataclass(frozen=True)
class Unit:
    """Parameters of one pipeline stage that are written together: what is redone after a kill."""

    stage: int
    part: int
    parameters: tuple[tuple[Rule, int | None], ...]

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.part}"


@dataclass(frozen=True)
class Import:
    """What to make. `base` is the source's architecture, `arch` the one at the depth of `layer_map`."""

    source: HFDirectory
    target: Path
    base: Architecture
    arch: Architecture
    layer_map: LayerMap
    parallel: ParallelConfig
    dtype: torch.dtype
    unit_bytes: int


def import_hf(job: Import, about: dict[str, Any], progress: ProgressFactory) -> None:
    """Writes `job.target`: a store with one checkpoint at step 0, and `latest`. Collective over all ranks.

    Args:
        about: lineage to note; gets the hash of the weights.

    Raises UserError: values that the dtype cannot hold, a full disk, a source cut while it is read.
    """
    units = plan_units(job)
    total = job.arch.parameters() * job.dtype.itemsize
    with shared_directory(job.target, _identity(job)) as partial:
        place = partial.path / STEP
        done = partial.done()
        with together():
            if ranks.is_main():
                partial.clean(keep={f"{STEP}/{file}" for note in done.values() for file in note["files"]})
                place.mkdir(exist_ok=True)
        todo = my_share([unit for unit in units if unit.name not in done])
        mine = my_share(units)
        before = sum(_unit_bytes(job, unit) for unit in mine if unit.name in done)
        with together(), SideJobs() as beside:
            share = total if ranks.world_size() == 1 else sum(_unit_bytes(job, unit) for unit in mine)
            with progress(share, "bytes", "convert", min(before, share)) as line:
                for unit in todo:
                    _write_unit(job, unit, partial, beside, line.advance)
        with together():
            if ranks.is_main():
                _finish(job, units, partial, about)


def plan_units(job: Import) -> list[Unit]:
    """Every parameter once, by stage, in parts of at most `unit_bytes` (a larger parameter is a part of its
    own)."""
    units: list[Unit] = []
    for stage in range(job.parallel.pp):
        part: list[tuple[Rule, int | None]] = []
        size = number = 0
        for rule, layer in _of_stage(job, stage):
            more = _parameter_bytes(job, rule)
            if part and size + more > job.unit_bytes:
                units.append(Unit(stage, number, tuple(part)))
                part, size, number = [], 0, number + 1
            part.append((rule, layer))
            size += more
        units.append(Unit(stage, number, tuple(part)))
    return units


def _of_stage(job: Import, stage: int) -> Iterator[tuple[Rule, int | None]]:
    layers = layers_of_chunk(job.arch.num_layers, job.parallel, stage, 0)
    for rule, layer in model_rules(job.arch):
        if layer is None:
            here = stage == (0 if rule is EMBEDDING else job.parallel.pp - 1)
        else:
            here = layer in layers
        if here:
            yield rule, layer


def _parameter_bytes(job: Import, rule: Rule) -> int:
    shapes = hf_shapes(job.arch)
    return sum(torch.Size(shapes[name]).numel() for name in hf_names(rule, 0)) * job.dtype.itemsize


def _unit_bytes(job: Import, unit: Unit) -> int:
    return sum(_parameter_bytes(job, rule) for rule, _ in unit.parameters)


def _identity(job: Import) -> dict[str, Any]:
    """What a killed run must have been making to be continued."""
    return {
        "route": "hf to megatron",
        "version": __version__,
        "source": str(job.source.path.resolve()),
        "files": fingerprint(job.source.path),
        "layer_map": job.layer_map.to_json(),
        "layout": [job.parallel.tp, job.parallel.pp],
        "dtype": str(job.dtype),
        "unit_bytes": job.unit_bytes,
    }


def _write_unit(job: Import, unit: Unit, partial: Partial, beside: SideJobs, advance: Any) -> None:
    """The unit's files, one per tensor-parallel rank; noted as done when they are on the disk."""
    tp = job.parallel.tp
    files = [f"__{t + tp * unit.stage}_{unit.part}.distcp" for t in range(tp)]
    writers = [ItemWriter(partial.path / STEP, file) for file in files]
    pieces: list[Any] = []
    objects: list[Any] = []
    digests = []
    for rule, layer in unit.parameters:
        tensors = _read(job, rule, layer)
        for name, tensor in tensors.items():
            digests.append((name, beside.submit(tensor_digest, tensor)))
        names = hf_names(rule, layer)
        whole = whole_shape(rule, job.arch)
        key = stored_key(rule.megatron, layer)
        for t, writer in enumerate(writers):
            shard = rule.packing.read(Loaded(tensors), names, job.arch, t, tp)
            for offsets, piece in pieces_of(rule, shard, whole, t, tp):
                place = writer.write(
                    piece if owns_memory(piece) else piece.clone(memory_format=torch.contiguous_format)
                )
                pieces.append((key, list(whole), offsets, list(piece.shape), _plain(place)))
        extra = extra_state_key(key)
        if extra:
            objects.append((extra, _plain(writers[0].write([None]))))
        advance(sum(tensor.numel() for tensor in tensors.values()) * job.dtype.itemsize)
    note = {"files": files, "pieces": pieces, "objects": objects}

    def to_disk() -> None:
        for writer in writers:
            with writer:
                writer.sync()
        partial.finish(unit.name, {**note, "digests": {name: job.result() for name, job in digests}})

    beside.submit(to_disk)


def _read(job: Import, rule: Rule, layer: int | None) -> dict[str, Tensor]:
    """{name in the target: tensor} of one parameter, in the target's dtype."""
    mapped = MappedSource(job.source.tensors, job.layer_map)
    shapes = hf_shapes(job.arch)
    return {
        name: cast_to(read_whole(mapped, name, shapes[name]), job.dtype, name)
        for name in hf_names(rule, layer)
    }


def _plain(place: Place) -> list[Any]:
    return [place.file, place.offset, place.length]


def _finish(job: Import, units: list[Unit], partial: Partial, about: dict[str, Any]) -> None:
    """Index, common part, run state and `latest`, from the notes of all units."""
    from solar_mega.checkpoint.run_state import RunState, write_run_state

    place, notes = partial.path / STEP, partial.done()
    builder, digests = IndexBuilder(), {}
    for unit in units:
        note = notes[unit.name]
        for key, shape, offsets, sizes, where in note["pieces"]:
            builder.add_piece(key, job.dtype, tuple(shape), tuple(offsets), tuple(sizes), Place(*where))
        for key, where in note["objects"]:
            builder.add_object(key, Place(*where))
        digests |= note["digests"]
    write_index(place, builder.build())
    write_format(place, {"content_metadata": dict(CONTENT)})
    name = str(job.dtype).removeprefix("torch.")
    config = {key: value for key, value in job.arch.hf_config.items() if key != "torch_dtype"}
    state = RunState(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        schedule={},
        hf_config={**config, "dtype": name},
        config_toml="",
        parallel={"tp": job.parallel.tp, "pp": job.parallel.pp, "vpp": 1},
        source=str(job.source.path.resolve()),
        lineage={**about, "weights_hash": weights_hash(digests)},
    )
    write_run_state(place, state)
    (partial.path / "latest").write_text(STEP + "\n", "utf-8")


def write_format(place: Path, common: dict[str, Any]) -> None:
    """common.pt, and metadata.json, which makes the directory a checkpoint for stock readers."""
    torch.save(common, place / "common.pt")
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (place / "metadata.json").write_text(json.dumps(config), "utf-8")
