"""Proof that a directory is another one through a layer map: every tensor compared bit for bit."""

import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from solar_mega.artifact.cast import cast_chunks
from solar_mega.artifact.grow import GrowthPlan, Move, plan_growth
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.layer_source import made_chunks
from solar_mega.artifact.progress import ProgressFactory, silent
from solar_mega.artifact.safetensors_format import DTYPES
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes

# Keys of config.json that tell who saved it and how to load it, not what the model computes.
_ABOUT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
# Recomputed from the config at load time; old Llama checkpoints carry it, new ones do not.
_DERIVED = ".rotary_emb.inv_freq"
_THREADS = 3  # one reads while the others compare
_STRETCH = 64 << 20
_DECODING = threading.Lock()  # one tensor at a time, or memory grows with the threads
_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e"}


@dataclass(frozen=True)
class Difference:
    """The first element that differs, in file order of the destination."""

    name: str
    source: str
    """The source tensor it should equal."""

    index: tuple[int, ...]
    """Where in the tensor, one number per dimension."""

    expected: str
    found: str

    def __str__(self) -> str:
        place = "" if not self.index else f" at [{', '.join(map(str, self.index))}]"
        return f"{self.name} differs from source {self.source}{place}: {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `ok` only when every tensor is there, nothing else is, and all bits agree."""

    tensors: int
    """Tensors compared to their end."""

    nbytes: int
    """Bytes of the destination compared."""

    structure: tuple[str, ...] = ()
    """Unreadable files; missing, extra, misshapen tensors; differing config keys. Empty when all agree."""

    difference: Difference | None = None

    @property
    def ok(self) -> bool:
        return not self.structure and self.difference is None

    def describe(self) -> str:
        """One screen: the verdict, and what is wrong."""
        if self.ok:
            return f"equal: {self.tensors} tensors, {human_bytes(self.nbytes)}, bit for bit"
        lines = ["DIFFERENT"]
        if self.difference is not None:
            lines.append(f"  - first differing tensor: {self.difference}")
        lines += [f"  - {text}" for text in self.structure[:20]]
        if len(self.structure) > 20:
            lines.append(f"  - ... and {len(self.structure) - 20} more")
        return "\n".join(lines)


def verify(
    src: HFDirectory,
    dst: HFDirectory,
    layer_map: LayerMap,
    dtype: str | None = None,
    progress: ProgressFactory = silent,
) -> VerifyReport:
    """Compares `dst` with `src` through `layer_map`: config, names, shapes, dtypes, and then all bits, up to
    the first difference. Streamed; memory does not grow with the model.

    Args:
        dtype: what the weights were cast to on the way (safetensors spelling), if they were.

    Raises:
        UserError: the source cannot be read or the map does not fit it. A destination that cannot be read is
            not an error but a different destination, and the report says so.
    """
    plan = plan_growth(src, layer_map, dtype)
    structure = config_differences(plan.config, dst.config)
    try:
        target = dst.tensors
    except UserError as error:
        return VerifyReport(0, 0, (*structure, str(error)))
    moves = []
    for move in plan.moves:
        info = target.infos.get(move.name)
        if info is None:
            if not move.name.endswith(_DERIVED):
                structure.append(f"{move.name} is missing (source {move.source})")
        elif (info.dtype, info.shape) != (move.dtype, move.shape):
            structure.append(
                f"{move.name} is {info.dtype} {list(info.shape)}, expected {move.dtype} {list(move.shape)}"
            )
        else:
            moves.append(move)
    planned = {move.name for move in plan.moves}
    extra = [name for name in target.infos if name not in planned]
    structure += [f"{name} is extra: nothing in the source maps to it" for name in extra]
    # In the order of the destination's bytes, so that its shards are read from front to back.
    moves.sort(key=lambda move: (target.infos[move.name].file, target.infos[move.name].offset))
    return _compare(plan, moves, target, tuple(structure), progress)


def _compare(
    plan: GrowthPlan,
    moves: list[Move],
    target: SafetensorsReader,
    structure: tuple[str, ...],
    progress: ProgressFactory,
) -> VerifyReport:
    source = plan.source.tensors
    stretches = [(move, begin) for move in moves for begin in _stretches(source, move)]
    for move in moves:  # the threads share the readers, whose files are opened here
        source.descriptor(move.source), target.descriptor(move.name)
    tensors, nbytes = 0, 0
    beside = ThreadPoolExecutor(_THREADS)
    try:
        with progress(sum(move.nbytes for move in moves), "bytes", "verify") as line:
            found_in_order = beside.map(lambda piece: _check(source, target, *piece), stretches)
            for (move, begin), found in zip(stretches, found_in_order, strict=True):
                if found is not None:
                    return VerifyReport(tensors, nbytes, structure, found)
                size = _size(source, move, begin)
                line.advance(size)
                tensors, nbytes = tensors + (begin + size == move.nbytes), nbytes + size
    finally:
        beside.shutdown(cancel_futures=True)
        source.close()
        target.close()
    return VerifyReport(tensors, nbytes, structure)


def _copied(source: SafetensorsReader, move: Move) -> bool:
    return move.recipe is None and source.infos[move.source].dtype == move.dtype


def _stretches(source: SafetensorsReader, move: Move) -> Iterable[int]:
    """Where a tensor is cut for the threads: a copy anywhere, one that must be made again nowhere."""
    return range(0, max(1, move.nbytes), _STRETCH if _copied(source, move) else max(1, move.nbytes))


def _size(source: SafetensorsReader, move: Move, begin: int) -> int:
    return min(_STRETCH, move.nbytes - begin) if _copied(source, move) else move.nbytes


def _check(source: SafetensorsReader, target: SafetensorsReader, move: Move, begin: int) -> Difference | None:
    """One stretch of a tensor of the destination."""
    if _copied(source, move):
        size = _size(source, move, begin)
        expected, found = source.stretch(move.source, begin, size), target.stretch(move.name, begin, size)
        return _first_unequal(move, begin, expected, found)
    with _DECODING:
        if move.recipe is not None:
            expected = made_chunks(source, move.recipe, move.dtype)
        else:
            expected = cast_chunks(source, move.source, move.dtype)
        return _first_unequal(move, 0, map(bytes, expected), target.raw(move.name))


def _first_unequal(move: Move, byte: int, expected: Iterable, found: Iterable) -> Difference | None:
    for left, right in zip(expected, found, strict=True):
        if left != right:
            return _difference(move, byte, bytes(left), bytes(right))
        byte += len(right)
    return None


def _difference(move: Move, start: int, left: bytes, right: bytes) -> Difference:
    at = _first_difference(left, right)
    width = max(1, DTYPES[move.dtype][0] // 8)
    element, begin = (start + at) // width, at - (start + at) % width
    index = []
    for size in reversed(move.shape):
        index.append(element % size)
        element //= size
    values = [_value(move.dtype, chunk[begin : begin + width]) for chunk in (left, right)]
    return Difference(move.name, move.source, tuple(reversed(index)), *values)


def _first_difference(left: bytes, right: bytes) -> int:
    """Position of the first unequal byte, by halving: comparing slices is a memcmp."""
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] != right[low:middle]:
            high = middle
        else:
            low = middle
    return low


def _value(dtype: str, raw: bytes) -> str:
    """An element for a person to read, with its bits: two NaNs or zeros may differ in bits only."""
    bits = "0x" + raw[::-1].hex()
    if dtype == "BF16":
        return f"{struct.unpack('<f', bytes(2) + raw)[0]:g} ({bits})"
    if dtype in _STRUCT:
        return f"{struct.unpack(_STRUCT[dtype], raw)[0]:g} ({bits})"
    if dtype.startswith(("I", "U")):
        return str(int.from_bytes(raw, "little", signed=dtype.startswith("I")))
    return bits


def config_differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Keys that both configs have and that disagree, and per-layer keys that the destination lost.

    Keys of one side only are no difference in themselves: transformers adds and renames defaults.
    """
    texts = []
    for key, value in expected.items():
        if key in _ABOUT:
            continue
        if key in found and found[key] != value:
            texts.append(f"config.json: {key} is {_short(found[key])}, expected {_short(value)}")
        elif key == "layer_types" and key not in found and len(set(value)) > 1:
            texts.append(f"config.json: {key} is missing; expected {_short(value)}")
    return texts


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
