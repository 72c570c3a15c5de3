"""The index of a Megatron checkpoint: `.metadata`, read without trusting it.

    .metadata                 which tensor is where: a pickle of torch's dataclasses
    __R_S.distcp              items back to back, each as torch.save writes a tensor or an object
    common.pt, metadata.json  what is not sharded, and the format's name

A pickle can name any function and have it called. The reader here looks names up in a short list of harmless
classes, so a file that wants anything else is refused before anything of it runs.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from solar_mega.errors import UserError

METADATA = ".metadata"

_CLASSES = {
    metadata: (
        "Metadata",
        "StorageMeta",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
    planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
}
# (module, name) -> what it stands for. Nothing here does more than build a value.
_SAFE: dict[tuple[str, str], Any] = {
    (module.__name__, name): getattr(module, name)
    for module, names in _CLASSES.items()
    for name in names
    if hasattr(module, name)
}
_SAFE |= {
    ("torch", str(kind).removeprefix("torch.")): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}
_SAFE |= {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): Path,
    ("pathlib", "Path"): Path,
    ("pathlib._local", "PosixPath"): Path,  # Python 3.13's place for it
}


class _Ignored:
    """Stands for what older megatron-core versions kept for themselves, which no reader needs."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
_SAFE |= {(_STRATEGY, name): _Ignored for name in ("MCoreMetadata", "MCoreSavePlan")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise UserError(f"it asks for {module}.{name}, which no checkpoint index needs; nothing was run")
        return _SAFE[module, name]


@dataclass(frozen=True)
class Place:
    """Where an item's bytes are: [offset, offset + length) of `file`."""

    file: str
    offset: int
    length: int


def read_index(path: Path) -> metadata.Metadata:
    """`.metadata` of the checkpoint in `path`.

    Raises UserError when it is missing or damaged, or is not an index: it names anything outside a list of
    harmless classes, stores an item in a way that this program does not read, or places one outside `path`.
    """
    file = Path(path) / METADATA
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except UserError as error:
        raise UserError(f"{file} is refused: {error}") from None
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} has no {METADATA}, the index of its tensors") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f"checkpoint {path} is damaged: {file} cannot be read ({type(error).__name__}: {error})"
        ) from None
    problem = _problem(content)
    if problem:
        raise UserError(f"checkpoint {path} is damaged: {file} {problem}")
    return content


def _problem(content: Any) -> str | None:
    if not isinstance(content, metadata.Metadata):
        return f"holds a {type(content).__name__}, not an index"
    stored, places = content.state_dict_metadata, content.storage_data
    if not isinstance(stored, dict) or not isinstance(places, dict):
        return "lacks the tensors or their places"
    for index, info in places.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            return f"has an entry {index!r} that is not an item's place"
        if Path(info.relative_path).name != info.relative_path:
            return f"places {index.fqn} in {info.relative_path!r}, outside the checkpoint"
        if getattr(info, "transform_descriptors", None):
            return f"says that {index.fqn} is transformed ({info.transform_descriptors}); only plain items "
            "are read"
    return None


def place_of(content: metadata.Metadata, key: str, offset: tuple[int, ...] | None) -> Place:
    """Where the item of `key` at `offset` (None for an object) is. Raises UserError when it is nowhere."""
    index = metadata.MetadataIndex(key, None if offset is None else torch.Size(offset))
    info = content.storage_data.get(index)
    if info is None:
        raise UserError(f"the index lists {key} at {offset} and does not say where it is")
    return Place(info.relative_path, info.offset, info.length)


class IndexBuilder:
    """Collects items and makes the index that stock readers expect."""

    def __init__(self) -> None:
        self.tensors: dict[str, metadata.TensorStorageMetadata] = {}
        self.objects: dict[str, metadata.BytesStorageMetadata] = {}
        self.places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}

    def add_piece(
        self,
        key: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        place: Place,
    ) -> None:
        """One piece of tensor `key` of the whole `shape`."""
        if key not in self.tensors:
            properties = metadata.TensorProperties(dtype=dtype)
            self.tensors[key] = metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        self.tensors[key].chunks.append(chunk)
        self._put(metadata.MetadataIndex(key, torch.Size(offsets)), place)

    def add_object(self, key: str, place: Place) -> None:
        self.objects[key] = metadata.BytesStorageMetadata()
        self._put(metadata.MetadataIndex(key), place)

    def _put(self, index: metadata.MetadataIndex, place: Place) -> None:
        self.places[index] = filesystem._StorageInfo(place.file, place.offset, place.length)

    def build(self, like: metadata.Metadata | None = None) -> metadata.Metadata:
        """The index; `like` lends what is not about items (version, storage_meta)."""
        content: dict[str, Any] = {
            "state_dict_metadata": {**self.tensors, **self.objects},
            "planner_data": None,
            "storage_data": self.places,
        }
        if like is not None:
            made = replace(like, **content)
        else:
            made = metadata.Metadata(**content, storage_meta=metadata.StorageMeta())
            if hasattr(made, "version"):  # since torch 2.10
                made.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
        return made


def write_index(path: Path, content: metadata.Metadata) -> None:
    """Writes `.metadata` into the directory `path`."""
    with open(Path(path) / METADATA, "wb") as stream:
        pickle.dump(content, stream)
