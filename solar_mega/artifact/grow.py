"""Hugging Face directory -> deeper Hugging Face directory, by moving bytes.

Growing copies whole tensors, so nothing is decoded: each tensor's bytes go from the source's shard to their
place in the target's inside the kernel, and memory stays flat however large the model is. Only a change of
dtype, and tensors that the map averages, scales or adds noise to, are decoded, in chunks.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from solar_mega import __version__
from solar_mega.artifact.card import model_card
from solar_mega.artifact.cast import cast_chunks, cast_dtype
from solar_mega.artifact.hf import HFDirectory, grown_config, split_layer, write_config
from solar_mega.artifact.layer_source import Making, check_made, check_recipe, made_chunks, making
from solar_mega.artifact.lineage import Parent, directory_hash, write_lineage
from solar_mega.artifact.progress import ProgressFactory, silent
from solar_mega.artifact.safetensors_format import DTYPES, tensor_bytes
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.safetensors_writer import SHARD_BYTES, ShardedWriter, split_into_shards
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.runtime.files import require_empty, require_space, sync_file
from solar_mega.runtime.partial import Partial, SideJobs, fingerprint, left_behind, resumable_directory

_SPARE = 16 << 20  # bytes of disk beyond the weights: headers, index, tokenizer, directories


class Move(NamedTuple):
    """One tensor of the target and the source tensor it is made of. `dtype` is the target's."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]

    recipe: Making | None = None
    """Where the tensor is more than a copy of `source`."""

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class GrowthPlan:
    """Everything that growing will write, known before anything is written."""

    source: HFDirectory
    layer_map: LayerMap
    shard_bytes: int
    config: dict[str, Any]
    """config.json of the target."""

    moves: tuple[Move, ...] = field(repr=False)
    """All tensors as they lie in the target: embeddings, layers, head."""

    @property
    def parameters(self) -> int:
        return sum(self.source.tensors.infos[move.source].elements for move in self.moves)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(move.nbytes for move in self.moves)

    @property
    def shards(self) -> int:
        return len(split_into_shards([(move.name, move.nbytes) for move in self.moves], self.shard_bytes))


@dataclass(frozen=True)
class GrowReport:
    """What `grow` wrote."""

    path: Path
    layers: int
    tensors: int
    parameters: int
    nbytes: int
    shards: int
    seconds: float


def plan_growth(
    src: HFDirectory, layer_map: LayerMap, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> GrowthPlan:
    """Checks the source and lays out the target. Writes nothing; a dry run ends here.

    Args:
        dtype: safetensors dtype for floating weights (`cast.weight_dtype` reads the user's spelling); None
            keeps each tensor's own.

    Raises:
        UserError: the source is damaged or incomplete, the map is for another depth, asks for fresh layers
            (there are no bytes to move for them) or for changes that the layers do not allow, or the config
            cannot follow it.
    """
    config = grown_config(src.config, layer_map)
    src.check_weights()
    if dtype is not None:
        for key in ("torch_dtype", "dtype"):
            if key in config or key == "dtype" and "torch_dtype" not in config:
                config[key] = DTYPES[dtype][1]
    layers: dict[int, list[str]] = {}
    outside: list[str] = []
    for name in src.tensors.infos:
        layer, _ = split_layer(name)
        (outside if layer is None else layers.setdefault(layer, [])).append(name)
    check_recipe(
        layer_map,
        {layer: {split_layer(name)[1] for name in names} for layer, names in layers.items()},
        str(src.path),
    )
    moves = [_move(src, name, name, dtype) for name in outside if "embed" in name]
    for target in range(len(layer_map)):
        for source in layers[layer_map.sources_of(target)[0]]:
            suffix = split_layer(source)[1]
            recipe = making(layer_map, target, suffix, len(src.tensors.infos[source].shape))
            moves.append(_move(src, recipe.name, source, dtype, recipe))
    moves += [_move(src, name, name, dtype) for name in outside if "embed" not in name]
    return GrowthPlan(src, layer_map, shard_bytes, config, tuple(moves))


def _move(src: HFDirectory, name: str, source: str, dtype: str | None, recipe: Making | None = None) -> Move:
    info = src.tensors.infos[source]
    made = recipe is not None and not recipe.plain
    if made:
        check_made(src.tensors, recipe)
    return Move(name, source, cast_dtype(info.dtype, dtype, source), info.shape, recipe if made else None)


def grow(
    src: HFDirectory,
    dst: Path,
    layer_map: LayerMap,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: ProgressFactory = silent,
) -> GrowReport:
    """Writes `src` through `layer_map` as the directory `dst`: weights, config, tokenizer and side files,
    lineage.json and a model card. `dst` appears only when complete; the source is only read. A run that was
    killed is continued from its finished shards.

    Args: as `plan_growth`; `progress` is `runtime.console.Progress` or nothing.

    Raises:
        UserError: what `plan_growth` finds, `dst` not empty or inside `src`, too little space, a full disk.
    """
    started = time.monotonic()
    dst = Path(dst).absolute()
    require_empty(dst, "DST")
    if src.path.resolve() in dst.resolve().parents:
        raise UserError(f"DST: {dst} lies inside the source {src.path}; name a directory outside it")
    plan = plan_growth(src, layer_map, dtype, shard_bytes)
    require_room(plan, dst)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        # The parent's hash reads the same files; beside the copy it costs a core, not a second pass.
        content_hash = beside.submit(directory_hash, src.path, stop.is_set)
        try:
            with resumable_directory(dst, _identity(plan, dtype)) as partial:
                _move_tensors(plan, partial, progress)
                src.copy_side_files(partial.path)
                write_config(partial.path, plan.config)
                name, base = dst.name, src.path.resolve().name
                card = model_card(name, base, src.architecture, layer_map, plan.parameters)
                (partial.path / "README.md").write_text(card, "utf-8")
                made_by = f"convert --layer-map {layer_map.spelling}" + (f" --dtype {dtype}" if dtype else "")
                parent = Parent.of(src.path, content_hash.result())
                write_lineage(partial.path, made_by, [parent], layer_map)
        finally:
            stop.set()
    seconds = time.monotonic() - started
    return GrowReport(
        dst, len(layer_map), len(plan.moves), plan.parameters, plan.nbytes, plan.shards, seconds
    )


def require_room(plan: GrowthPlan, dst: Path) -> None:
    """Raises UserError when the disk of `dst` cannot take what the plan will write."""
    require_space(dst, plan.nbytes + _SPARE - left_behind(dst))


def _identity(plan: GrowthPlan, dtype: str | None) -> dict[str, Any]:
    """What a killed run must have been making to be continued."""
    return {
        "route": "hf to hf",
        "version": __version__,
        "source": str(plan.source.path.resolve()),
        "files": fingerprint(plan.source.path),
        "layer_map": plan.layer_map.to_json(),
        "dtype": dtype,
        "shard_bytes": plan.shard_bytes,
    }


def _source_order(moves: list[Move], reader: SafetensorsReader) -> list[Move]:
    """As the source lies on the disk, all copies of a tensor in a row: what the map repeats is read
    once, and the parent's hash finds it in memory."""
    return sorted(moves, key=lambda move: (reader.infos[move.source].file, reader.infos[move.source].offset))


def _move_tensors(plan: GrowthPlan, partial: Partial, progress: ProgressFactory) -> None:
    reader = plan.source.tensors
    done = partial.done()
    partial.clean(keep=done.keys())

    def to_disk(file: str) -> None:
        sync_file(partial.path / file)
        partial.finish(file)

    with (
        SideJobs() as beside,  # a finished shard goes to the disk while the next one is filled
        ShardedWriter(
            partial.path, plan.shard_bytes, finished=lambda file: beside.submit(to_disk, file)
        ) as writer,
    ):
        writer.plan([(move.name, move.dtype, move.shape) for move in plan.moves])
        writer.select(set(writer.files) - done.keys())
        moves = [move for move in plan.moves if writer.infos[move.name].file not in done]
        moves = _source_order(moves, reader)
        before = plan.nbytes - sum(move.nbytes for move in moves)
        with progress(plan.nbytes, "bytes", "grow", before) as line:
            for move in moves:
                if move.recipe is not None:
                    writer.write_chunks(move.name, made_chunks(reader, move.recipe, move.dtype))
                    line.advance(move.nbytes)
                elif reader.infos[move.source].dtype == move.dtype:
                    writer.copy_from(reader, move.source, move.name, line.advance)
                else:
                    writer.write_chunks(move.name, cast_chunks(reader, move.source, move.dtype))
                    line.advance(move.nbytes)
    reader.close()
