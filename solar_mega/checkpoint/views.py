"""A Megatron checkpoint seen as the Hugging Face tensors it holds."""

from typing import NamedTuple

import torch
from torch import Tensor

from solar_mega.artifact.layer_source import MappedSource
from solar_mega.artifact.safetensors_format import dtype_name
from solar_mega.checkpoint.items import CheckpointTensors, stored_key
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes, model_rules
from solar_mega.errors import Problems, UserError
from solar_mega.model.architecture import Architecture


class ViewInfo(NamedTuple):
    """As `artifact.safetensors_format.TensorInfo`, for what has no place of its own in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class MegatronView:
    """Tensors by Hugging Face name, at the checkpoint's own depth: a reader as `SafetensorsReader` is one.

    The parameter read last is kept, because its tensors are mostly asked for together.
    """

    def __init__(self, stored: CheckpointTensors, arch: Architecture) -> None:
        self.stored, self.arch = stored, arch
        self.shapes = hf_shapes(arch)
        self._owner: dict[str, tuple[Rule, int | None]] = {
            name: (rule, layer) for rule, layer in model_rules(arch) for name in hf_names(rule, layer)
        }
        self._last: tuple[Rule, int | None] | None = None
        self._tensors: dict[str, Tensor] = {}

    def key(self, name: str) -> str:
        """Where the checkpoint has the tensor. Raises UserError for a name the model does not have."""
        if name not in self._owner:
            raise UserError(f"checkpoint {self.stored.path} has no tensor {name}")
        rule, layer = self._owner[name]
        return stored_key(rule.megatron, layer)

    def info(self, name: str) -> ViewInfo:
        key = self.key(name)
        if key not in self.stored.tensors:
            raise UserError(f"checkpoint {self.stored.path} has no tensor {key}")
        return ViewInfo(name, dtype_name(self.stored.tensors[key].dtype), self.shapes[name])

    def read(self, name: str) -> Tensor:
        """The whole tensor; not to be written to. Raises UserError as `CheckpointTensors.read`."""
        key, owner = self.key(name), self._owner[name]
        if owner != self._last:
            self._last, self._tensors = None, {}
            rule, layer = owner
            parts = rule.packing.unpack([self.stored.read(key)], self.arch)
            self._tensors = dict(zip(hf_names(rule, layer), parts, strict=True))
            self._last = owner
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        return self.read(name).narrow(dim, start, stop - start)

    def problems(self) -> list[str]:
        """Parameters that are missing or have the wrong number of elements, and tensors of no parameter."""
        found, wanted = [], set()
        weights = self.stored.weights
        for rule, layer in model_rules(self.arch):
            key = stored_key(rule.megatron, layer)
            wanted.add(key)
            elements = sum(torch.Size(self.shapes[name]).numel() for name in hf_names(rule, layer))
            if key not in weights:
                found.append(f"{key} is missing")
            elif torch.Size(weights[key].shape).numel() != elements:
                found.append(f"{key} has shape {list(weights[key].shape)}, expected {elements} elements")
        return found + [
            f"{key} is extra: the model has no such parameter" for key in weights if key not in wanted
        ]

    def check(self) -> None:
        """Raises UserError listing `problems`."""
        problems = Problems()
        found = self.problems()
        for text in found[:20] if len(found) <= 20 else [*found[:19], f"... and {len(found) - 19} more"]:
            problems.add(text)
        problems.raise_if_any(f"checkpoint {self.stored.path}")


def read_whole(source: MappedSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """All rows of the grown model's tensor `name`."""
    return source.read_rows(name, 0, shape[0])
