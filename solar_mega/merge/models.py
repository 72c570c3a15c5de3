"""What is merged: Hugging Face directories, and Megatron checkpoints seen as ones.

A checkpoint's parameters are put together from their shards one at a time and unpacked into the tensors of
its Hugging Face export, so that all methods, filters and angles mean the same for both.
"""

import threading
from functools import cached_property
from pathlib import Path

from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.safetensors_format import DTYPES, TensorInfo, tensor_bytes
from solar_mega.artifact.safetensors_reader import SafetensorsReader, as_bytes
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.checkpoint.source import Source, open_source
from solar_mega.checkpoint.views import MegatronView
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.runtime.files import read_into


def open_model(path: Path) -> "Model":
    """A Hugging Face directory, a Megatron checkpoint, or a run's directory, whose latest checkpoint it is.

    Raises UserError for anything else.
    """
    if path.is_dir() and not (path / "config.json").exists():
        source = open_source(path, "--models")
        return MegatronModel(path, source)
    return Model(path)


class Model(HFDirectory):
    """A Hugging Face directory, read by several threads."""

    @cached_property
    def tensors(self) -> "FileTensors":
        return FileTensors(self.path)

    @property
    def tokenizer_directory(self) -> Path:
        return self.path


class FileTensors(SafetensorsReader):
    def open(self, name: str) -> None:
        """Opens the file of `name`, which is not made for races."""
        self.descriptor(name)

    def read_bytes(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `start` on. Raises UserError when the file ends
        early."""
        info = self.info(name)
        try:
            read_into(self.descriptor(name), buffer, info.offset + start)
        except EOFError as error:
            place = self.directory / info.file
            raise UserError(f"{place} was cut while it was read ({name}): {error}") from error


class MegatronModel(Model):
    """A Megatron checkpoint as merging sees a model. Its weights count, not its optimizer states."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self.checkpoint = source.path
        self.config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        self._home = source.side_files

    @property
    def tokenizer_directory(self) -> Path:
        return self._home

    @cached_property
    def tensors(self) -> "MegatronTensors":  # type: ignore[override]
        tensors = MegatronTensors(self.path, self.checkpoint, Architecture.from_hf(self.config))
        dtypes = {info.dtype for info in tensors.infos.values()}
        if len(dtypes) == 1:
            self.config["dtype"] = DTYPES[dtypes.pop()][1]
        return tensors

    def check_weights(self) -> None:
        self.tensors.view.check()

    def copy_side_files(self, target: Path) -> None:
        if (self._home / "config.json").is_file():
            HFDirectory(self._home).copy_side_files(target)


class MegatronTensors:
    """The weights by Hugging Face name, with the face of `FileTensors`.

    Threads may read at the same time; each keeps the parameter that it read last, as tensors of one parameter
    mostly follow each other. Memory: two copies of the largest parameter per thread.
    """

    def __init__(self, directory: Path, checkpoint: Path, arch: Architecture) -> None:
        self.directory = directory
        self._stored = CheckpointTensors(checkpoint)
        self.view = MegatronView(self._stored, arch)
        self.view.check()
        self.infos: dict[str, TensorInfo] = {}
        place = 0
        for name in self.view.shapes:
            _, dtype, shape = self.view.info(name)
            nbytes = tensor_bytes(dtype, shape)
            self.infos[name] = TensorInfo(name, dtype, shape, "", place, nbytes)
            place += nbytes
        self._of_thread = threading.local()

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def open(self, name: str) -> None:
        """Opens the files of `name`."""
        for piece in self._stored.tensors[self.view.key(name)].pieces:
            self._stored.descriptor(piece.place.file)

    def read_bytes(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `start` on."""
        buffer[:] = self._bytes(name)[start : start + len(buffer)]

    def _bytes(self, name: str) -> memoryview:
        if getattr(self._of_thread, "name", None) != name:
            view: MegatronView = self._of_thread.__dict__.setdefault(
                "view", MegatronView(self._stored, self.view.arch)
            )
            tensor: Tensor = view.read(name).contiguous()
            self._of_thread.name, self._of_thread.bytes = name, as_bytes(tensor)
        return self._of_thread.bytes

    def close(self) -> None:
        self._of_thread = threading.local()
        self._stored.close()
