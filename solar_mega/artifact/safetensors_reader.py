"""Safetensors directories read by offset: whole tensors, slices, raw bytes.

Nothing but the tensor at hand is ever in memory, and torch is not needed until a tensor is asked for.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solar_mega.artifact.safetensors_format import (
    TensorInfo,
    index_name,
    read_header,
    read_index,
    tensor_bytes,
    torch_dtype,
)
from solar_mega.artifact.torch_bin import read_pickle
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.files import read_into

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 4 << 20
_SHOWN = 20  # problems spelled out in one error


class SafetensorsReader:
    """The tensors of a directory, safetensors or PyTorch's .bin, validated as a whole before the first one is
    read.

    Raises UserError listing everything that is wrong: missing or truncated shards, headers that are not
    JSON or too long, tensors that overlap, leave gaps or have the wrong number of bytes, names that the
    index places in a shard that lacks them, names found twice or not in the index.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        """Bytes of tensor data read so far, headers not counted. Slices count exactly the bytes they hold."""
        self._descriptors: dict[str, int] = {}
        problems = Problems()
        self.files, listed = read_index(self.directory, problems)
        problems.raise_if_any(f"checkpoint {self.directory}")
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            read = read_pickle if file.endswith(".bin") else read_header
            for info in read(self.directory / file, problems):
                if info.name in self.infos:
                    problems.add(f"{info.name} is in both {self.infos[info.name].file} and {file}")
                self.infos.setdefault(info.name, info)
        if listed is not None:
            self._compare_with_index(listed, problems)
        if len(problems.texts) > _SHOWN:
            problems.texts[_SHOWN:] = [f"... and {len(problems.texts) - _SHOWN} more"]
        problems.raise_if_any(f"checkpoint {self.directory}")

    def _compare_with_index(self, listed: dict[str, str], problems: Problems) -> None:
        index = index_name(self.directory)
        broken = {file for file in self.files if any(text.startswith(f"{file}:") for text in problems.texts)}
        for name, file in listed.items():
            info = self.infos.get(name)
            if info is None and file not in broken:
                problems.add(f"{index} places {name} in {file}, which does not have it")
            elif info is not None and info.file != file and file not in broken:
                problems.add(f"{index} places {name} in {file}, but it is in {info.file}")
        for name, info in self.infos.items():
            if name not in listed:
                problems.add(f"{info.file} holds {name}, which {index} does not list")

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()

    def close(self) -> None:
        """Closes the shards; they open again when something is read."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def info(self, name: str) -> TensorInfo:
        """Raises UserError naming the directory when it has no such tensor."""
        if name not in self.infos:
            raise UserError(
                f"checkpoint {self.directory} has no tensor {name} (it has {len(self.infos)} others)"
            )
        return self.infos[name]

    def descriptor(self, name: str) -> int:
        """An open file descriptor of the shard that holds `name`; it belongs to the reader."""
        file = self.info(name).file
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
        return self._descriptors[file]

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, in memory of its own."""
        info = self.info(name)
        tensor, buffer = _empty(info.dtype, info.shape)
        self._read_into(info, buffer, info.offset)
        return tensor

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> "torch.Tensor":
        """Indices [start, stop) along `dim`, in memory of its own.

        Reads those bytes and no others: one stretch for dim 0, otherwise one segment per index of the
        dimensions before `dim` ([rows, columns] with dim 1: one per row). Raises ValueError out of range.
        """
        info = self.info(name)
        if not (0 <= dim < len(info.shape) and 0 <= start <= stop <= info.shape[dim]):
            raise ValueError(f"[{start}, {stop}) along dim {dim} is outside {name} {list(info.shape)}")
        tensor, buffer = _empty(info.dtype, (*info.shape[:dim], stop - start, *info.shape[dim + 1 :]))
        stretches = math.prod(info.shape[:dim])
        if not len(buffer):
            return tensor
        segment, stride = len(buffer) // stretches, info.nbytes // stretches
        first = info.offset + start * (stride // info.shape[dim])
        if segment == stride:  # everything along dim: one stretch
            stretches, segment = 1, len(buffer)
        for i in range(stretches):
            self._read_into(info, buffer[i * segment : (i + 1) * segment], first + i * stride)
        return tensor

    def raw(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The tensor's bytes in chunks, undecoded."""
        info = self.info(name)
        for at in range(0, info.nbytes, chunk_bytes):
            size = min(chunk_bytes, info.nbytes - at)
            chunk = os.pread(self.descriptor(name), size, info.offset + at)
            if len(chunk) != size:
                raise UserError(f"{self.directory / info.file} was cut while it was read ({name})")
            self.bytes_read += size
            yield chunk

    def stretch(self, name: str, start: int, count: int, chunk_bytes: int = 1 << 20) -> Iterator[bytearray]:
        """`count` of the tensor's bytes from `start`, in chunks. All chunks are one buffer, which stays in a
        core's cache: a chunk is gone when the next is asked for."""
        info = self.info(name)
        buffer = bytearray(min(chunk_bytes, count))
        for at in range(start, start + count, chunk_bytes):
            size = min(chunk_bytes, start + count - at)
            if size < len(buffer):
                buffer = bytearray(size)
            self._read_into(info, memoryview(buffer), info.offset + at)
            yield buffer

    def _read_into(self, info: TensorInfo, buffer: memoryview, offset: int) -> None:
        try:
            read_into(self.descriptor(info.name), buffer, offset)
        except EOFError as error:
            raise UserError(
                f"{self.directory / info.file} was cut while it was read ({info.name}): {error}"
            ) from error
        self.bytes_read += len(buffer)


def _empty(dtype: str, shape: Sequence[int]) -> "tuple[torch.Tensor, memoryview]":
    """An uninitialised tensor and its bytes."""
    import torch

    raw = torch.empty(tensor_bytes(dtype, shape), dtype=torch.uint8)
    return raw.view(torch_dtype(dtype)).view(tuple(shape)), memoryview(raw.numpy())


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """A tensor's bytes in row-major order; copies only what is not contiguous in CPU memory."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
