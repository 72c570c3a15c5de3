"""Megatron checkpoint -> Megatron checkpoint through a layer map, optimizer states included, on disk.

Stored tensors are whole per layer, or rows of a stack, so a deeper checkpoint holds no byte that the source
does not hold: its index says for target layer g what the source's index says for layer map[g]. Two ways:

    zero-copy    the index is written, the files are hard links to the source's: milliseconds, any size
    copy         each item that is needed is copied once, however many layers start from it

Either is read by stock Megatron on any layout.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from solar_mega import __version__
from solar_mega.artifact.hf import split_layer
from solar_mega.artifact.layer_source import MappedSource, making
from solar_mega.artifact.progress import ProgressFactory
from solar_mega.checkpoint.common import patched_common
from solar_mega.checkpoint.index import IndexBuilder, Place, place_of, write_index
from solar_mega.checkpoint.items import STATES, CheckpointTensors, ItemWriter, per_layer, stacked, stored_key
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes, model_rules
from solar_mega.checkpoint.run_state import RUN_STATE, RunState, file_hashes, read_run_state, write_run_state
from solar_mega.checkpoint.sharing import my_share, shared_directory, together
from solar_mega.checkpoint.tensors import Loaded, cast_to, whole_shape
from solar_mega.checkpoint.views import MegatronView, read_whole
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.files import atomic_directory
from solar_mega.runtime.partial import Partial, SideJobs, fingerprint

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


@dataclass(frozen=True)
class Remap:
    """What to make. `hf_config` is config.json at the depth of `layer_map`; None for a checkpoint of another
    Megatron program, which has none."""

    source: Path
    target: Path
    layer_map: LayerMap
    hf_config: dict[str, Any] | None
    base_config: dict[str, Any] | None = None
    """config.json of the source, where there is one."""

    dtype: torch.dtype | None = None
    """Of the model's weights; None keeps it. Optimizer states keep theirs."""

    optimizer: bool = True
    """Whether optimizer states go along."""

    file_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """A key of the target: a tensor with its pieces, or an object (dtype None)."""

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...], Place], ...]
    """(offsets, sizes, where the source has it)."""


_MADE = "made"  # stands for a file in the place of a tensor that no item of the source holds


class Plan:
    """Everything that the target holds, by the source's places.

    `made` are tensors that the map averages, scales or adds noise to: {place: (rule, target layer)}. They are
    computed and stored anew, all others stay as they are.

    Raises UserError for optimizer states that cannot follow the map, and for a map that changes weights of a
    checkpoint without a config.
    """

    def __init__(self, job: Remap, stored: CheckpointTensors) -> None:
        self.job, self.stored = job, stored
        layer_map = job.layer_map
        self.arch = None if job.hf_config is None else Architecture.from_hf(job.base_config, str(job.source))
        self.made: dict[Place, tuple[Rule, int]] = {}
        self._new: dict[str, Place] = {}  # per-layer key in the target -> its place in `made`
        if layer_map.changed:
            self._plan_changes()
        self._copies: dict[int, list[int]] = {source: [] for source in range(layer_map.source_layers)}
        for g in range(len(layer_map)):
            self._copies[layer_map.sources_of(g)[0]].append(g)
        self.entries = list(self._entries())

    def _plan_changes(self) -> None:
        layer_map = self.job.layer_map
        if self.arch is None:
            raise UserError(
                f'layer map "{layer_map}" changes weights, which needs the model\'s config; '
                f"{self.job.source} was not written by solar_mega and has none: convert it --to hf with "
                "--hf-config first"
            )
        if self.job.optimizer and self.stored.states:
            raise UserError(
                f'layer map "{layer_map}" changes the weights of target layers '
                f"{', '.join(map(str, layer_map.changed[:8]))}; optimizer states do not follow on disk. "
                "Leave "
                "them out with --optimizer drop, or train through the map, which makes them too"
            )
        for g in layer_map.changed:
            for rule in {rule: None for rule, layer in model_rules(self.arch) if layer == 0}:
                shapes = hf_shapes(self.arch)
                recipes = [
                    making(layer_map, g, split_layer(name)[1], len(shapes[name]))
                    for name in hf_names(rule, 0)
                ]
                if not all(recipe.plain for recipe in recipes):
                    size = whole_shape(rule, self.arch).numel() * self._dtype(rule).itemsize
                    place = Place(_MADE, len(self.made), size)
                    self.made[place] = (rule, g)
                    self._new[stored_key(rule.megatron, g)] = place

    def _dtype(self, rule: Rule) -> torch.dtype:
        return self.stored.tensors[stored_key(rule.megatron, 0)].dtype

    def _entries(self) -> Iterator[Entry]:
        index, depth = self.stored.index, len(self.job.layer_map)
        for key, held in index.state_dict_metadata.items():
            if key.startswith(STATES):
                if not self.job.optimizer:
                    continue
                _check_state(key)
            if not isinstance(held, TensorStorageMetadata):
                name, slash, shard = key.partition("/shard_")
                where = ((), (), place_of(index, key, None))
                for new in _object_keys(name, slash, shard, self._copies, depth):
                    yield Entry(new, None, (), (where,))
                continue
            pieces = [
                (tuple(c.offsets), tuple(c.sizes), place_of(index, key, tuple(c.offsets)))
                for c in held.chunks
            ]
            dtype, shape = held.properties.dtype, tuple(held.size)
            found, pile = per_layer(key), stacked(key)
            if found:
                for g in self._copies[found[1]]:
                    new = f"{found[0]}{g}.{found[2]}"
                    made = self._new.get(new)
                    zero = ((0,) * len(shape), shape, made)
                    yield Entry(new, dtype, shape, tuple(pieces) if made is None else (zero,))
            elif pile:
                yield Entry(key, dtype, (depth, *shape[1:]), tuple(self._of_stack(pile, shape, pieces)))
            else:
                yield Entry(key, dtype, shape, tuple(pieces))

    def _of_stack(self, pile: tuple[str, str], shape: tuple[int, ...], pieces: list) -> Iterator[tuple]:
        """Pieces of a stack of layers in the target: rows of the source's, and rows made anew."""
        made = {g: self._new.get(f"{pile[0]}{g}.{pile[1]}") for g in range(len(self.job.layer_map))}
        for offsets, sizes, place in pieces:
            for g in self._copies[offsets[0]]:
                if made[g] is None:
                    yield (g, *offsets[1:]), sizes, place
        for g, place in made.items():
            if place is not None:
                yield (g, *(0,) * (len(shape) - 1)), (1, *shape[1:]), place

    def place_of_made(self, key: str) -> Place | None:
        """Whether the target's tensor `key` (per-layer spelling) is made anew, and as which of `made`."""
        return self._new.get(key)

    def make(self, place: Place, sizes: tuple[int, ...]) -> Tensor:
        """A tensor of `made`, as one rank alone would hold it, with a layer axis where `sizes` has one."""
        rule, g = self.made[place]
        mapped = MappedSource(MegatronView(self.stored, self.arch), self.job.layer_map)
        shapes = hf_shapes(self.arch)
        names = hf_names(rule, g)
        # A layer beyond the source's depth has the shapes of any other.
        tensors = {
            name: read_whole(mapped, name, shapes[like])
            for name, like in zip(names, hf_names(rule, 0), strict=True)
        }
        return rule.packing.read(Loaded(tensors), names, self.arch, 0, 1).reshape(sizes).contiguous()


def _check_state(key: str) -> None:
    if ".distributed." in key or "dp_group_idx" in key:
        raise UserError(
            f"the optimizer states ({key}) are stored by data-parallel rank, not by layer, and cannot follow "
            "a layer map; save them fully_reshardable, or leave them out with --optimizer drop"
        )


def _object_keys(name: str, slash: str, shard: str, copies: dict[int, list[int]], depth: int) -> list[str]:
    """Keys of an object in the target: `NAME/shard_<offsets>_<shape>`, the layer in the name or first in
    both lists."""
    found = per_layer(name)
    if found:
        return [f"{found[0]}{g}.{found[2]}{slash}{shard}" for g in copies[found[1]]]
    if stacked(name) and slash:
        offsets, shape = (part.split(".") for part in shard.split("_"))
        tail = ".".join([str(depth), *shape[1:]])
        return [f"{name}{slash}{'.'.join([str(g), *offsets[1:]])}_{tail}" for g in copies[int(offsets[0])]]
    return [f"{name}{slash}{shard}"]


def zero_copy(plan: Plan, about: dict[str, Any]) -> bool:
    """Writes `job.target` by links; False, with nothing written, where the file system does not link these
    files. For one process. Raises UserError when the source is damaged or the target cannot be written."""
    job, stored = plan.job, plan.stored
    try:
        with atomic_directory(job.target) as partial:
            place = checkpoint_place(job, partial)
            used = {piece[2].file for entry in plan.entries for piece in entry.pieces} - {_MADE}
            for file in sorted(used):
                os.link(job.source / file, place / file)
            made = _write_made(plan, place)
            write_index(place, _index(plan.entries, stored.index, lambda where: made.get(where, where)))
            _surroundings(job, place, about, linked=True)
    except OSError as error:
        if error.errno in _NO_LINKS and error.filename2 is not None:
            return False
        raise
    return True


def _write_made(plan: Plan, place: Path) -> dict[Place, Place]:
    """Stores tensors that the map changes in a file of their own; {stand-in: place}."""
    if not plan.made:
        return {}
    sizes = {piece[2]: piece[1] for entry in plan.entries for piece in entry.pieces}
    with ItemWriter(place, "__changed_0.distcp") as writer:
        return {where: writer.write(plan.make(where, sizes[where])) for where in plan.made}


def copy(plan: Plan, about: dict[str, Any], progress: ProgressFactory) -> None:
    """Writes `job.target` by copying the items it needs, each once. Collective over all ranks.

    Raises UserError as `zero_copy`, and for values that the dtype cannot hold.
    """
    job, stored = plan.job, plan.stored
    units = _units(job, plan.entries)
    with shared_directory(job.target, _identity(job)) as partial:
        done = partial.done()
        with together():
            if ranks.is_main():
                inside = checkpoint_place(job, partial.path).relative_to(partial.path)
                partial.clean(keep={str(inside / name) for name in done})
        with together():
            _copy_units(plan, units, partial, progress)
        with together():
            if ranks.is_main():
                places = {}
                for note in partial.done().values():
                    places |= {Place(*old): Place(*new) for old, new in note}
                place = checkpoint_place(job, partial.path)
                write_index(place, _index(plan.entries, stored.index, places.__getitem__, job.dtype))
                _surroundings(job, place, about, linked=False)


def checkpoint_place(job: Remap, root: Path) -> Path:
    """The directory in `root` that becomes the checkpoint: a store's step, or `root` where the source is not
    ours."""
    if job.hf_config is None:
        return root
    step = read_run_state(job.source).step if job.optimizer and (job.source / RUN_STATE).is_file() else 0
    place = root / f"step-{step:08d}"
    place.mkdir(exist_ok=True)
    (root / "latest").write_text(place.name + "\n", "utf-8")
    return place


_Unit = tuple[str, list[tuple[Place, Entry, tuple]]]
"""File name, and the source items that go into it."""


def _units(job: Remap, found: list[Entry]) -> list[_Unit]:
    """Each source item once, in the order of the source's files, cut into files of at most `file_bytes`."""
    items = {piece[2]: (entry, piece) for entry in found for piece in entry.pieces}
    units: list[_Unit] = []
    filled = job.file_bytes
    for place in sorted(items, key=lambda place: (place.file, place.offset)):
        if filled + place.length > job.file_bytes:
            units.append((f"__{len(units)}_0.distcp", []))
            filled = 0
        units[-1][1].append((place, *items[place]))
        filled += place.length
    return units


def _copy_units(plan: Plan, units: list[_Unit], partial: Partial, progress: ProgressFactory) -> None:
    job = plan.job
    done = partial.done()
    place = checkpoint_place(job, partial.path)
    mine = my_share(units)
    nbytes = {name: sum(where.length for where, _, _ in items) for name, items in mine}
    before = sum(size for name, size in nbytes.items() if name in done)
    with SideJobs() as beside, progress(sum(nbytes.values()), "bytes", "convert", before) as line:
        for name, items in mine:
            if name in done:
                continue
            writer, note = ItemWriter(place, name), []
            for where, entry, piece in items:
                note.append((_plain(where), _plain(_put(plan, writer, where, entry, piece, line.advance))))

            def to_disk(name: str = name, writer: ItemWriter = writer, note: list = note) -> None:
                with writer:
                    writer.sync()
                partial.finish(name, note)

            beside.submit(to_disk)


def _put(
    plan: Plan, writer: ItemWriter, where: Place, entry: Entry, piece: tuple, advance: Callable[[int], None]
) -> Place:
    """Appends one item: moved as it is, or decoded where its values or dtype change."""
    job = plan.job
    if where in plan.made:
        tensor = plan.make(where, piece[1])
    elif not _changes(job, entry):
        try:
            return writer.copy(plan.stored.descriptor(where.file), where, advance)
        except EOFError as error:
            raise UserError(f"checkpoint {job.source} is damaged: {where.file} was cut: {error}") from error
    else:
        tensor = plan.stored.read_item(entry.key, where, piece[1], entry.dtype)
    advance(where.length)
    return writer.write(tensor if job.dtype is None else cast_to(tensor, job.dtype, entry.key))


def _changes(job: Remap, entry: Entry) -> bool:
    """Whether the dtype of this tensor changes."""
    weight = entry.dtype is not None and not entry.key.startswith(STATES)
    return job.dtype is not None and weight and entry.dtype != job.dtype


def _plain(place: Place) -> tuple[str, int, int]:
    return place.file, place.offset, place.length


def _index(
    found: list[Entry],
    like: Metadata,
    placed: Callable[[Place], Place] = lambda place: place,
    dtype: torch.dtype | None = None,
) -> Metadata:
    builder = IndexBuilder()
    for entry in found:
        if entry.dtype is None:
            builder.add_object(entry.key, placed(entry.pieces[0][2]))
            continue
        kept = dtype is None or entry.key.startswith(STATES)
        for offsets, sizes, place in entry.pieces:
            builder.add_piece(
                entry.key, entry.dtype if kept else dtype, entry.shape, offsets, sizes, placed(place)
            )
    return builder.build(like)


def _surroundings(job: Remap, place: Path, about: dict[str, Any], linked: bool) -> None:
    """common.pt at the new depth, metadata.json, and the run state of a checkpoint of ours."""
    patched_common(job.source, place, len(job.layer_map), job.optimizer)
    (place / "metadata.json").write_bytes((job.source / "metadata.json").read_bytes())
    if job.hf_config is not None:
        # Linked files are the source's, and so are their hashes.
        kept = file_hashes(job.source) if linked else None
        write_run_state(place, _run_state(job, about), kept)


def _run_state(job: Remap, about: dict[str, Any]) -> RunState:
    config = dict(job.hf_config or {})
    if job.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(job.dtype).removeprefix("torch.")
    state = read_run_state(job.source)
    if not job.optimizer:
        state = replace(state, step=0, consumed_samples=0, consumed_tokens=0, schedule={}, config_toml="")
    return replace(state, hf_config=config, lineage=about)


def _identity(job: Remap) -> dict[str, Any]:
    return {
        "route": "megatron to megatron",
        "version": __version__,
        "source": str(job.source.resolve()),
        "files": fingerprint(job.source),
        "layer_map": job.layer_map.to_json(),
        "dtype": str(job.dtype),
        "optimizer": job.optimizer,
        "file_bytes": job.file_bytes,
    }
