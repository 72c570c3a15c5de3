"""One item of a `.distcp` file: a zip archive as torch.save writes it, stored without compression.

item    | data.pkl (dtype, shape) | data/0 (the elements) | directory |
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solar_mega.checkpoint.index import Place
from solar_mega.runtime.files import copy_range


class _Window(io.RawIOBase):
    """[offset, offset + length) of an open file as a file of its own, for zipfile."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self.descriptor, self.place, self.at = descriptor, place, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.place.length}[whence]
        self.at = max(0, origin + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.place.length - self.at)
        if size <= 0:
            return 0
        data = os.pread(self.descriptor, size, self.place.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


_LOCAL_HEADER = 30  # bytes of a zip entry's fixed part; two lengths at its end say how long the rest is


def payload_start(descriptor: int, place: Place, elements: int, dtype: torch.dtype) -> int | None:
    """Where in the file the elements of a tensor item begin; None for a layout that only torch can undo.

    Raises ValueError when the item is a tensor of another dtype or size.
    """
    with zipfile.ZipFile(io.BufferedReader(_Window(descriptor, place), 1 << 12)) as archive:
        names = {entry.filename.split("/", 1)[-1]: entry for entry in archive.infolist()}
        described = _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        if not isinstance(described, _Described):
            raise ValueError(f"it holds a {type(described).__name__}, not a tensor")
        if described.dtype != dtype or described.elements != elements:
            raise ValueError(
                f"it holds {described.elements} elements of {described.dtype}, the index says {elements} of "
                f"{dtype}"
            )
        entry = names[f"data/{described.storage}"]
        little = "byteorder" not in names or archive.read(names["byteorder"]) == b"little"
    if not described.plain or entry.compress_type != zipfile.ZIP_STORED or not little:
        return None
    begin = described.offset * dtype.itemsize
    if entry.file_size < begin + elements * dtype.itemsize:
        raise ValueError(f"its storage has {entry.file_size} bytes")
    header = os.pread(descriptor, _LOCAL_HEADER, place.offset + entry.header_offset)
    if len(header) < _LOCAL_HEADER:
        raise EOFError("the file ends inside the item")
    rest = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return place.offset + entry.header_offset + _LOCAL_HEADER + rest + begin


def load_item(descriptor: int, place: Place) -> Tensor:
    with io.BufferedReader(_Window(descriptor, place)) as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Described:
    dtype: torch.dtype
    storage: str
    offset: int
    elements: int
    plain: bool
    """Row-major without gaps."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads what torch.save says about one plain tensor; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage") and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, elements = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        return dtype, key, elements


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _describe(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Described:
    expected, plain = 1, True
    for length, step in zip(reversed(tuple(size)), reversed(tuple(stride)), strict=True):
        plain = plain and (length == 1 or step == expected)
        expected *= length
    dtype, key, _ = storage
    return _Described(dtype, str(key), offset, expected, plain)


class ItemWriter:
    """Writes one `.distcp` file, item after item."""

    def __init__(self, directory: Path, file: str) -> None:
        self.file = file
        self._stream = io.FileIO(directory / file, "w")

    def __enter__(self) -> "ItemWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, value: Any) -> Place:
        """A tensor, or a small object, as torch.save writes it."""
        start = self._stream.tell()
        sink = _Unbuffered(self._stream)
        try:
            torch.save(value, sink)
        except RuntimeError:  # torch says so of every failed write, a full disk included
            if sink.error is not None:
                raise sink.error from None
            raise
        return Place(self.file, start, self._stream.tell() - start)

    def copy(self, descriptor: int, place: Place, advance: Callable[[int], None] | None = None) -> Place:
        """An item of another file, its bytes moved inside the kernel. Raises EOFError when that file is
        cut."""
        start = self._stream.tell()
        copy_range(descriptor, place.offset, self._stream.fileno(), start, place.length, advance)
        self._stream.seek(start + place.length)
        return Place(self.file, start, place.length)

    def sync(self) -> None:
        os.fsync(self._stream.fileno())


class _Unbuffered(io.RawIOBase):
    """An unbuffered file whose `write` writes everything: the kernel takes at most 2 GiB a call, and torch
    does not look at what `write` returns."""

    def __init__(self, stream: io.FileIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self.stream.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done

    def tell(self) -> int:
        return self.stream.tell()
