"""Megatron checkpoints as merging sees them: with the tensors of their Hugging Face exports.

A checkpoint's parameters are put together from their shards one at a time and unpacked into the tensors of
its Hugging Face export, so that all methods, filters and angles mean the same for both.
"""

import threading
from functools import cached_property
from pathlib import Path

from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.lineage import Parent
from solar_mega.artifact.safetensors_format import DTYPES, TensorInfo, tensor_bytes
from solar_mega.artifact.safetensors_reader import as_bytes
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.checkpoint.source import Source, open_source
from solar_mega.checkpoint.to_hf import parent_of
from solar_mega.checkpoint.views import MegatronView
from solar_mega.merge.models import Model
from solar_mega.model.architecture import Architecture


def open_megatron(path: Path) -> "MegatronModel":
    """A checkpoint, or a run's directory: its latest. Raises UserError for anything else."""
    return MegatronModel(path, open_source(path, "--models"))


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

    def parent(self, content_hash: str | None) -> Parent:
        """Known by its run state; its files are not hashed."""
        return parent_of(self.checkpoint)

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

    def window(self, name: str, start: int, nbytes: int) -> memoryview:
        """Bytes [start, start + nbytes) of the tensor."""
        return self._bytes(name)[start : start + nbytes]

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
