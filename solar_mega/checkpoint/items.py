"""The tensors of a Megatron checkpoint on disk, read one at a time: no model, no process groups.

The elements of an item lie in one stretch of its file (`item_format`) and are read from there straight into
the memory they belong in.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from solar_mega.checkpoint.index import Place, place_of, read_index
from solar_mega.checkpoint.item_format import load_item, payload_start
from solar_mega.errors import UserError
from solar_mega.runtime.files import read_into

STATES = ("optimizer.", "chained_")
"""How keys of optimizer states begin."""

_STACKED = re.compile(r"^(.*?decoder\.layers\.)(?!\d+\.)(.+)$")
_PER_LAYER = re.compile(r"^(.*?decoder\.layers\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Piece:
    """One stored part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint. `row` is its layer where the layers of a parameter are stacked."""

    key: str
    """As the index spells it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Without the layer axis."""

    pieces: tuple[Piece, ...]
    """Offsets and sizes without the layer axis."""

    row: int | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# Checkpoint keys as Transformer Engine spells them; the model's own names differ only here.
_SPELLED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LINEAR = re.compile(r"^(decoder\.layers\.\d+\..*linear_[a-z0-9]+)\.weight$")


def stored_key(parameter: str, layer: int | None) -> str:
    """The key of a parameter (`mlp.linear_fc1.weight`) of layer `layer`, or of one outside the layers."""
    return parameter if layer is None else f"decoder.layers.{layer}.{_SPELLED.get(parameter, parameter)}"


def extra_state_key(key: str) -> str | None:
    """The key of the object that Megatron stores beside a layer's linear weight: Transformer Engine's FP8
    scales, or None without it. None for other parameters, which have no such object."""
    match = _LINEAR.match(key)
    return f"{match[1]}._extra_state/shard_0_1" if match else None


def per_layer(key: str) -> tuple[str, int, str] | None:
    """(prefix, layer, rest) of `optimizer.state.exp_avg.decoder.layers.7.mlp...`; None outside the layers."""
    match = _PER_LAYER.match(key)
    return (match[1], int(match[2]), match[3]) if match else None


def stacked(key: str) -> tuple[str, str] | None:
    """(prefix, rest) of a key that stands for all layers at once; None for others."""
    match = _STACKED.match(key)
    return (match[1], match[2]) if match else None


class CheckpointTensors:
    """Tensors by per-layer key, whether the checkpoint keeps layers apart or stacked.

    Raises UserError when the index cannot be read, is not one, or does not cover its tensors.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        self.tensors: dict[str, Stored] = {}
        for key, entry in self.index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                for stored in self._stored(key, entry):
                    name = stored.key
                    if stored.row is not None:
                        prefix, rest = stacked(key)
                        name = f"{prefix}{stored.row}.{rest}"
                    self.tensors[name] = stored
        self._descriptors: dict[str, int] = {}

    @property
    def weights(self) -> dict[str, Stored]:
        """The model's own tensors."""
        return {key: stored for key, stored in self.tensors.items() if not key.startswith(STATES)}

    @property
    def states(self) -> dict[str, Stored]:
        """The optimizer's."""
        return {key: stored for key, stored in self.tensors.items() if key.startswith(STATES)}

    @cached_property
    def layers(self) -> int:
        """Decoder layers. Raises UserError when there are none."""
        numbers = [found[1] for key in self.weights if (found := per_layer(key))]
        if not numbers:
            raise UserError(
                f"checkpoint {self.path} holds no decoder layers (no tensor is named decoder.layers.*)"
            )
        return max(numbers) + 1

    def _stored(self, key: str, entry: TensorStorageMetadata) -> Iterator[Stored]:
        shape = tuple(entry.size)
        pieces = [
            Piece(tuple(chunk.offsets), tuple(chunk.sizes), place_of(self.index, key, tuple(chunk.offsets)))
            for chunk in entry.chunks
        ]
        dtype = entry.properties.dtype
        if stacked(key) is None:
            yield Stored(key, dtype, shape, tuple(pieces))
            return
        rows: dict[int, list[Piece]] = {row: [] for row in range(shape[0])}
        for piece in pieces:
            if piece.sizes[0] != 1:
                raise UserError(
                    f"checkpoint {self.path}: {key} is stored with {piece.sizes[0]} layers in one piece; "
                    "only one layer per piece is read"
                )
            rows[piece.offsets[0]].append(Piece(piece.offsets[1:], piece.sizes[1:], piece.place))
        for row, parts in rows.items():
            yield Stored(key, dtype, shape[1:], tuple(parts), row)

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, file: str) -> int:
        """An open descriptor of a file of the checkpoint; it belongs to this object."""
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(self.path / file, os.O_RDONLY)
            except OSError as error:
                raise UserError(
                    f"checkpoint {self.path} is damaged: {file} cannot be read ({error.strerror})"
                ) from None
        return self._descriptors[file]

    def read(self, key: str) -> Tensor:
        """The whole tensor, put together from its pieces in memory of its own.

        Raises UserError when the checkpoint lacks it, a file was cut, an item holds something else than the
        index says, or the pieces do not cover the tensor.
        """
        if key not in self.tensors:
            raise UserError(f"checkpoint {self.path} has no tensor {key} (it has {len(self.tensors)} others)")
        stored = self.tensors[key]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        covered = 0
        for piece in stored.pieces:
            part = whole
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            self._fill(part, key, piece.place, stored.dtype)
            covered += part.numel()
        if covered != whole.numel():
            raise UserError(
                f"checkpoint {self.path} is damaged: the pieces of {key} hold {covered} of {whole.numel()} "
                "elements"
            )
        return whole

    def read_item(self, key: str, place: Place, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One item, as it is stored. Errors as `read`; `key` is for their text."""
        part = torch.empty(sizes, dtype=dtype)
        self._fill(part, key, place, dtype)
        return part

    def _fill(self, part: Tensor, key: str, place: Place, dtype: torch.dtype) -> None:
        """Reads an item into `part`, a view of the tensor."""
        descriptor = self.descriptor(place.file)
        try:
            start = payload_start(descriptor, place, part.numel(), dtype)
            if start is None:
                part.copy_(load_item(descriptor, place).reshape(part.shape))
                return
            direct = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype)
            if direct.numel():
                read_into(descriptor, memoryview(direct.reshape(-1).view(torch.uint8).numpy()), start)
            if direct is not part:
                part.copy_(direct)
        except (
            EOFError,
            OSError,
            ValueError,
            RuntimeError,
            LookupError,
            zipfile.BadZipFile,
            pickle.UnpicklingError,
        ) as error:
            raise UserError(
                f"checkpoint {self.path} is damaged: {key} in {place.file} at byte {place.offset} cannot be "
                f"read ({type(error).__name__}: {error})"
            ) from error
