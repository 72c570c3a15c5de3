"""Megatron checkpoint -> Megatron checkpoint through a layer map, optimizer states included, on disk.

Stored tensors are whole per layer, or rows of a stack, so a deeper checkpoint holds no byte that the source
does not hold: its index says for target layer g what the source's index says for layer map[g]. Two ways:

    zero-copy    the index is written, the files are hard links to the source's: milliseconds, any size
    copy         each item that is needed is copied once, however many layers start from it

Either is read by stock Megatron on any layout.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from solar_mega import __version__
from solar_mega.artifact.progress import ProgressFactory
from solar_mega.checkpoint.common import patched_common
from solar_mega.checkpoint.index import IndexBuilder, Place, write_index
from solar_mega.checkpoint.item_format import ItemWriter
from solar_mega.checkpoint.items import STATES
from solar_mega.checkpoint.remap_plan import MADE, Entry, Plan, Remap
from solar_mega.checkpoint.run_state import RUN_STATE, RunState, file_hashes, read_run_state, write_run_state
from solar_mega.checkpoint.sharing import my_share, shared_directory, together
from solar_mega.checkpoint.tensors import cast_to
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.files import atomic_directory
from solar_mega.runtime.partial import Partial, SideJobs, fingerprint

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


def zero_copy(plan: Plan, about: dict[str, Any]) -> bool:
    """Writes `job.target` by links; False, with nothing written, where the file system does not link these
    files. For one process. Raises UserError when the source is damaged or the target cannot be written."""
    job, stored = plan.job, plan.stored
    try:
        with atomic_directory(job.target) as partial:
            place = checkpoint_place(job, partial)
            used = {piece[2].file for entry in plan.entries for piece in entry.pieces} - {MADE}
            for file in sorted(used):
                _link(job.source / file, place / file)
            made = _write_made(plan, place)
            write_index(place, _index(plan.entries, stored.index, lambda where: made.get(where, where)))
            _surroundings(job, place, about, linked=True)
    except _NoLinksError:
        return False
    return True


class _NoLinksError(Exception):
    """These two places cannot share a file."""


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise _NoLinksError from error
        raise


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
