"""What a Megatron checkpoint through a layer map consists of, by the places of the source's items."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from solar_mega.artifact.hf import split_layer
from solar_mega.artifact.layer_source import MappedSource, making
from solar_mega.checkpoint.index import Place, place_of
from solar_mega.checkpoint.items import STATES, CheckpointTensors, per_layer, stacked, stored_key
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes, model_rules
from solar_mega.checkpoint.tensors import Loaded, whole_shape
from solar_mega.checkpoint.views import MegatronView, read_whole
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture


@dataclass(frozen=True)
class Remap:
    """What to make. `hf_config` is config.json at the depth of `layer_map`; None for a checkpoint of another
    Megatron program, which has none."""

    source: Path
    target: Path
    layer_map: LayerMap
    hf_config: dict[str, Any] | None
    base_config: dict[str, Any] | None = None
    """config.json of the source, where there is one."""

    dtype: torch.dtype | None = None
    """Of the model's weights; None keeps it. Optimizer states keep theirs."""

    optimizer: bool = True
    """Whether optimizer states go along."""

    file_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """A key of the target: a tensor with its pieces, or an object (dtype None)."""

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...], Place], ...]
    """(offsets, sizes, where the source has it)."""


MADE = "made"  # stands for a file in the place of a tensor that no item of the source holds


class Plan:
    """Everything that the target holds, by the source's places.

    `made` are tensors that the map averages, scales or adds noise to: {place: (rule, target layer)}. They are
    computed and stored anew, all others stay as they are.

    Raises UserError for optimizer states that cannot follow the map, and for a map that changes weights of a
    checkpoint without a config.
    """

    def __init__(self, job: Remap, stored: CheckpointTensors) -> None:
        self.job, self.stored = job, stored
        layer_map = job.layer_map
        self.arch = None if job.hf_config is None else Architecture.from_hf(job.base_config, str(job.source))
        self.made: dict[Place, tuple[Rule, int]] = {}
        self._new: dict[str, Place] = {}  # per-layer key in the target -> its place in `made`
        if layer_map.changed:
            self._plan_changes()
        self._copies: dict[int, list[int]] = {source: [] for source in range(layer_map.source_layers)}
        for g in range(len(layer_map)):
            self._copies[layer_map.sources_of(g)[0]].append(g)
        self.entries = list(self._entries())

    def _plan_changes(self) -> None:
        layer_map = self.job.layer_map
        if self.arch is None:
            raise UserError(
                f'layer map "{layer_map}" changes weights, which needs the model\'s config; '
                f"{self.job.source} was not written by solar_mega and has none: convert it --to hf with "
                "--hf-config first"
            )
        if self.job.optimizer and self.stored.states:
            raise UserError(
                f'layer map "{layer_map}" changes the weights of target layers '
                f"{', '.join(map(str, layer_map.changed[:8]))}; optimizer states do not follow on disk. "
                "Leave "
                "them out with --optimizer drop, or train through the map, which makes them too"
            )
        for g in layer_map.changed:
            for rule in {rule: None for rule, layer in model_rules(self.arch) if layer == 0}:
                shapes = hf_shapes(self.arch)
                recipes = [
                    making(layer_map, g, split_layer(name)[1], len(shapes[name]))
                    for name in hf_names(rule, 0)
                ]
                if not all(recipe.plain for recipe in recipes):
                    size = whole_shape(rule, self.arch).numel() * self._dtype(rule).itemsize
                    place = Place(MADE, len(self.made), size)
                    self.made[place] = (rule, g)
                    self._new[stored_key(rule.megatron, g)] = place

    def _dtype(self, rule: Rule) -> torch.dtype:
        return self.stored.tensors[stored_key(rule.megatron, 0)].dtype

    def _entries(self) -> Iterator[Entry]:
        index, depth = self.stored.index, len(self.job.layer_map)
        for key, held in index.state_dict_metadata.items():
            if key.startswith(STATES):
                if not self.job.optimizer:
                    continue
                _check_state(key)
            if not isinstance(held, TensorStorageMetadata):
                name, slash, shard = key.partition("/shard_")
                where = ((), (), place_of(index, key, None))
                for new in _object_keys(name, slash, shard, self._copies, depth):
                    yield Entry(new, None, (), (where,))
                continue
            pieces = [
                (tuple(c.offsets), tuple(c.sizes), place_of(index, key, tuple(c.offsets)))
                for c in held.chunks
            ]
            dtype, shape = held.properties.dtype, tuple(held.size)
            found, pile = per_layer(key), stacked(key)
            if found:
                for g in self._copies[found[1]]:
                    new = f"{found[0]}{g}.{found[2]}"
                    made = self._new.get(new)
                    zero = ((0,) * len(shape), shape, made)
                    yield Entry(new, dtype, shape, tuple(pieces) if made is None else (zero,))
            elif pile:
                yield Entry(key, dtype, (depth, *shape[1:]), tuple(self._of_stack(pile, shape, pieces)))
            else:
                yield Entry(key, dtype, shape, tuple(pieces))

    def _of_stack(self, pile: tuple[str, str], shape: tuple[int, ...], pieces: list) -> Iterator[tuple]:
        """Pieces of a stack of layers in the target: rows of the source's, and rows made anew."""
        made = {g: self._new.get(f"{pile[0]}{g}.{pile[1]}") for g in range(len(self.job.layer_map))}
        for offsets, sizes, place in pieces:
            for g in self._copies[offsets[0]]:
                if made[g] is None:
                    yield (g, *offsets[1:]), sizes, place
        for g, place in made.items():
            if place is not None:
                yield (g, *(0,) * (len(shape) - 1)), (1, *shape[1:]), place

    def place_of_made(self, key: str) -> Place | None:
        """Whether the target's tensor `key` (per-layer spelling) is made anew, and as which of `made`."""
        return self._new.get(key)

    def make(self, place: Place, sizes: tuple[int, ...]) -> Tensor:
        """A tensor of `made`, as one rank alone would hold it, with a layer axis where `sizes` has one."""
        rule, g = self.made[place]
        mapped = MappedSource(MegatronView(self.stored, self.arch), self.job.layer_map)
        shapes = hf_shapes(self.arch)
        names = hf_names(rule, g)
        # A layer beyond the source's depth has the shapes of any other.
        tensors = {
            name: read_whole(mapped, name, shapes[like])
            for name, like in zip(names, hf_names(rule, 0), strict=True)
        }
        return rule.packing.read(Loaded(tensors), names, self.arch, 0, 1).reshape(sizes).contiguous()


def _check_state(key: str) -> None:
    if ".distributed." in key or "dp_group_idx" in key:
        raise UserError(
            f"the optimizer states ({key}) are stored by data-parallel rank, not by layer, and cannot follow "
            "a layer map; save them fully_reshardable, or leave them out with --optimizer drop"
        )


def _object_keys(name: str, slash: str, shard: str, copies: dict[int, list[int]], depth: int) -> list[str]:
    """Keys of an object in the target: `NAME/shard_<offsets>_<shape>`, the layer in the name or first in
    both lists."""
    found = per_layer(name)
    if found:
        return [f"{found[0]}{g}.{found[2]}{slash}{shard}" for g in copies[found[1]]]
    if stacked(name) and slash:
        offsets, shape = (part.split(".") for part in shard.split("_"))
        tail = ".".join([str(depth), *shape[1:]])
        return [f"{name}{slash}{'.'.join([str(g), *offsets[1:]])}_{tail}" for g in copies[int(offsets[0])]]
    return [f"{name}{slash}{shard}"]
