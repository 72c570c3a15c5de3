"""Safetensors directories written as a stream: shards laid out beforehand, tensors one at a time."""

import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solar_mega.artifact.safetensors_format import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorInfo,
    dtype_name,
    tensor_bytes,
)
from solar_mega.artifact.safetensors_reader import SafetensorsReader, as_bytes
from solar_mega.errors import UserError
from solar_mega.runtime.files import copy_range, write_all

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9


class ShardedWriter:
    """Writes a checkpoint as a stream: first the plan of all tensors, then the tensors one at a time.

        with ShardedWriter(directory, shard_bytes=5 * 10**9) as writer:
            writer.plan([(name, "BF16", shape), ...])
            writer.write(name, tensor)                    # or copy_from(reader, ...), or write_chunks(...)

    Shards are filled greedily in plan order, as transformers does, and are named
    `model-00001-of-0000N.safetensors` with an index; everything in one shard is `model.safetensors`. Inside a
    shard, wider dtypes come first, so that every tensor is aligned. Tensors may be written in any order; plan
    order is sequential on disk.

    Several processes share the work by shards: all plan the same, each names its own with `select`, and after
    all have called `leave` one of them, with none missing, writes headers and index with `close`. Shards that
    an earlier attempt finished are left out in the same way.

    A shard gets its header, and the directory its index, only after the last tensor: files that were left
    unfinished do not open as safetensors. Where a whole directory should appear at once, write into
    `runtime.files.atomic_directory`.
    """

    def __init__(
        self,
        directory: Path | str,
        shard_bytes: int = SHARD_BYTES,
        metadata: dict[str, str] | None = None,
        finished: Callable[[str], None] | None = None,
    ) -> None:
        """`finished` is called with a shard's file name when its last tensor was written."""
        if shard_bytes < 1:
            raise UserError(f"shard size is {shard_bytes} bytes; it must be at least 1")
        self.directory = Path(directory)
        self.shard_bytes = shard_bytes
        self.metadata = {"format": "pt"} if metadata is None else metadata
        self.infos: dict[str, TensorInfo] = {}
        self._finished = finished
        self._left = False
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()  # tensors may be written from several threads
        self._descriptors: dict[str, int] = {}
        self._missing: dict[str, set[str]] = {}

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and not self._left:
                self.close()
        finally:
            self._release()

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def plan(self, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        """Lays out all tensors, given as (name, safetensors dtype, shape). Each file is created, at its full
        size, when its first tensor is written.

        Raises ValueError for a name given twice or an unknown dtype, FileExistsError for a file in the way.
        """
        if self.infos:
            raise ValueError("plan was called before")
        if not tensors or len({name for name, _, _ in tensors}) != len(tensors):
            raise ValueError("a plan needs at least one tensor, and no name twice")
        shards = split_into_shards(
            [(tensor[0], tensor_bytes(*tensor[1:])) for tensor in tensors], self.shard_bytes
        )
        given = {name: (dtype, tuple(shape)) for name, dtype, shape in tensors}
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(file, {name: given[name] for name in names})
            self._missing[file] = set(names)

    def _lay_out(self, file: str, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -DTYPES[item[1][0]][0]):
            end = at + tensor_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = struct.pack("<Q", len(text)) + text
        for name, (dtype, shape) in tensors.items():
            begin, end = header[name]["data_offsets"]
            self.infos[name] = TensorInfo(name, dtype, shape, file, 8 + len(text) + begin, end - begin)
        self._sizes[file] = 8 + len(text) + at

    @property
    def files(self) -> tuple[str, ...]:
        """The planned shards in order."""
        return tuple(self._headers)

    def names(self, file: str) -> tuple[str, ...]:
        """Tensors of a shard in the order of the plan."""
        return tuple(name for name, info in self.infos.items() if info.file == file)

    def select(self, files: Collection[str]) -> None:
        """This writer writes these shards; the others are someone else's, or were finished before."""
        self._missing = {file: names for file, names in self._missing.items() if file in files}

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                new = os.O_CREAT | os.O_EXCL if file in self._missing else 0
                self._descriptors[file] = os.open(self.directory / file, os.O_RDWR | new, 0o666)
                if new:
                    os.ftruncate(self._descriptors[file], self._sizes[file])
            return self._descriptors[file]

    def _written(self, info: TensorInfo) -> None:
        with self._lock:
            self._missing[info.file].discard(info.name)
            finished = not self._missing[info.file]
        if finished and self._finished:
            self._finished(info.file)

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Writes a tensor of the planned dtype and shape. Raises ValueError when it is another one."""
        info = self._planned(name)
        given = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if given != (info.dtype, info.shape):
            raise ValueError(f"{name} was planned as {info.dtype} {info.shape}, got {given[0]} {given[1]}")
        write_all(self._descriptor(info.file), as_bytes(tensor), info.offset)
        self._written(info)

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Writes a tensor's bytes from chunks. Raises ValueError when they are too few or too many."""
        info = self._planned(name)
        done = 0
        for chunk in chunks:
            if done + len(chunk) > info.nbytes:
                raise ValueError(f"{name}: more than the planned {info.nbytes} bytes")
            done += write_all(self._descriptor(info.file), chunk, info.offset + done)
        if done != info.nbytes:
            raise ValueError(f"{name}: {done} of {info.nbytes} bytes")
        self._written(info)

    def copy_from(
        self, reader: SafetensorsReader, source: str, name: str, advance: Callable[[int], None] | None = None
    ) -> None:
        """Moves the bytes of the reader's tensor `source` to `name` without decoding them.

        `advance` is called with the bytes of each step. Raises ValueError when dtype or shape are not the
        planned ones.
        """
        info, origin = self._planned(name), reader.info(source)
        if (origin.dtype, origin.shape) != (info.dtype, info.shape):
            raise ValueError(
                f"{name} was planned as {info.dtype} {info.shape}, {source} is {origin.dtype} {origin.shape}"
            )
        try:
            copy_range(
                reader.descriptor(source),
                origin.offset,
                self._descriptor(info.file),
                info.offset,
                info.nbytes,
                advance,
            )
        except EOFError as error:
            raise UserError(
                f"{reader.directory / origin.file} was cut while it was read ({source}): {error}"
            ) from error
        reader.bytes_read += info.nbytes
        self._written(info)

    def _planned(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise ValueError(f"{name} is not in the plan")
        info = self.infos[name]
        if info.file not in self._missing:
            raise ValueError(f"{name} lies in {info.file}, which is not this writer's")
        if name not in self._missing[info.file]:
            raise ValueError(f"{name} was written before")
        return info

    def _check_complete(self) -> None:
        missing = sorted(name for names in self._missing.values() for name in names)
        if missing or not self.infos:
            some = ", ".join(missing[:3])
            raise ValueError(f"{len(missing)} of {len(self.infos)} planned tensors were not written: {some}")

    def leave(self) -> None:
        """Closes this writer's shards and leaves headers and index to another one's `close`.

        Raises ValueError when one of its tensors is missing.
        """
        self._check_complete()
        self._left = True
        self._release()

    def close(self) -> None:
        """Writes headers and index; `with` does it unless `leave` was called. Raises ValueError when a
        planned tensor is missing."""
        self._check_complete()
        for file, header in self._headers.items():
            write_all(self._descriptor(file), header, 0)
        if len(self._headers) > 1:
            total = sum(info.nbytes for info in self.infos.values())
            parameters = sum(info.elements for info in self.infos.values())
            content = {
                "metadata": {"total_parameters": parameters, "total_size": total},
                "weight_map": {name: self.infos[name].file for name in sorted(self.infos)},
            }
            (self.directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        self._release()


def split_into_shards(sizes: Sequence[tuple[str, int]], shard_bytes: int) -> list[list[str]]:
    """Names cut into shards of at most `shard_bytes`, in order; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
