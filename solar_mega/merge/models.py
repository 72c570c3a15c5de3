"""What is merged: Hugging Face directories; Megatron checkpoints, seen as ones, are in `merge.megatron`."""

import mmap
from functools import cached_property
from pathlib import Path

from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.lineage import Parent
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.errors import UserError


def open_model(path: Path) -> "Model":
    """A Hugging Face directory, a Megatron checkpoint, or a run's directory, whose latest checkpoint it is.

    Raises UserError for anything else.
    """
    if path.is_dir() and not (path / "config.json").exists():
        from solar_mega.merge.megatron import open_megatron

        return open_megatron(path)
    return Model(path)


class Model(HFDirectory):
    """A Hugging Face directory, read by several threads."""

    @cached_property
    def tensors(self) -> "FileTensors":
        return FileTensors(self.path)

    @property
    def tokenizer_directory(self) -> Path:
        return self.path

    def parent(self, content_hash: str | None) -> Parent:
        """As it stands in a lineage. `content_hash` is that of its directory, if one was computed."""
        return Parent.of(self.path, content_hash)


class FileTensors(SafetensorsReader):
    def open(self, name: str) -> None:
        """Opens the file of `name`, which is not made for races."""
        self.descriptor(name)

    def window(self, name: str, start: int, nbytes: int) -> memoryview:
        """Bytes [start, start + nbytes) of the tensor, where the page cache has them: nothing is copied. To
        be read only; valid as long as it is held. Raises UserError when the file ends early."""
        info = self.info(name)
        first = info.offset + start
        before = first % mmap.ALLOCATIONGRANULARITY
        try:
            # Copied where written to, which nobody does: torch warns of memory that must not be written to.
            pages = mmap.mmap(
                self.descriptor(name), before + nbytes, offset=first - before, access=mmap.ACCESS_COPY
            )
        except ValueError as error:
            place = self.directory / info.file
            raise UserError(f"{place} was cut while it was read ({name}): {error}") from error
        return memoryview(pages)[before:]
