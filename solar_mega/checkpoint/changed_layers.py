"""Layers that a map averages, scales or noises, loaded from a Megatron checkpoint.

Megatron's loader moves bytes, so a changed layer is loaded as it is stored, once per layer it averages, and
then made by `artifact.layer_source`, on each rank for the part it holds: bit for bit what converting the
Hugging Face form gives.

With an optimizer, the fp32 master weights are made the same way from the stored master weights. Adam's
moments are averaged where the layer is a mean and otherwise those of the layer it was copied from: they
estimate gradients, which a scaled or noised copy does not know better. Step counts are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from solar_mega.artifact.hf import split_layer
from solar_mega.artifact.layer_source import Making, combine, making, noise_rows
from solar_mega.checkpoint.names import Rule, hf_names, rule_of
from solar_mega.checkpoint.optimizer_state import states_of
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture


def plain_maps(layer_map: LayerMap) -> list[LayerMap]:
    """Maps of copies alone, which together name every layer that `layer_map` averages; one where it averages
    none."""
    count = max(len(layer_map.sources_of(g)) for g in range(len(layer_map)))
    return [
        LayerMap(
            layer_map.source_layers,
            tuple(
                None if target is None else layer_map.sources_of(g)[min(i, len(layer_map.sources_of(g)) - 1)]
                for g, target in enumerate(layer_map.targets)
            ),
        )
        for i in range(max(1, count))
    ]


@dataclass
class _Changed:
    """One parameter of this rank that is made, not copied."""

    parameter: nn.Parameter
    rule: Rule
    recipe: Making
    arch: Architecture
    resting: Tensor
    """The parameter's own memory, while it is loaded in the dtype of the checkpoint."""

    parts: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)


class ChangedLayers:
    """Between the loads of `plain_maps`: keeps what each one brought, and makes the layers in the end.

    Args:
        modules: this rank's chunks, unwrapped.
        stored: dtype of the checkpoint's layers.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        layer_map: LayerMap,
        stored: torch.dtype,
    ) -> None:
        self.optimizer, self.layer_map = optimizer, layer_map
        self.changed = [entry for module in modules for entry in _changed(module, layer_map)]
        for entry in self.changed:
            if optimizer is None and entry.parameter.dtype != stored:
                entry.parameter.data = torch.empty_like(entry.resting, dtype=stored)

    def keep(self, number: int) -> None:
        """Takes what load `number` (from 0) put into the parameters and their optimizer states."""
        for entry in self.changed:
            if number >= len(entry.recipe.origins):
                continue
            entry.parts.append(entry.parameter.data.clone())
            if self.optimizer is not None:
                held, _ = states_of(self.optimizer, entry.parameter)
                entry.states.append({key: tensor.detach().clone() for key, tensor in held.items()})

    def release(self) -> None:
        """Gives the parameters their own memory back; after a load that failed."""
        for entry in self.changed:
            entry.parameter.data = entry.resting

    def finish(self) -> None:
        """Writes the layers."""
        for entry in self.changed:
            noise = self._noise(entry) if entry.recipe.noise else None
            value = combine(entry.recipe, entry.parts, noise)
            entry.parameter.data = entry.resting
            entry.resting.copy_(value)
            if self.optimizer is not None:
                self._finish_states(entry, noise)

    def _finish_states(self, entry: _Changed, noise: Tensor | None) -> None:
        held, share = states_of(self.optimizer, entry.parameter)
        averaged = replace(entry.recipe, scale=1.0, noise=0.0)
        for key, tensor in held.items():
            parts = [state[key] for state in entry.states]
            if key == "master":
                mine = None if noise is None else noise.flatten()[share].view(tensor.shape)
                tensor.detach().copy_(combine(entry.recipe, parts, mine))
            elif not averaged.plain:
                tensor.copy_(combine(averaged, parts, None))

    def _noise(self, entry: _Changed) -> Tensor:
        names = hf_names(entry.rule, entry.recipe.target)
        shapes = dict(zip(names, entry.rule.packing.shapes(entry.arch), strict=True))
        t = parallel_state.get_tensor_model_parallel_rank()
        tp = parallel_state.get_tensor_model_parallel_world_size()
        drawn = entry.rule.packing.read(_Noise(self.layer_map, shapes), names, entry.arch, t, tp)
        return drawn.to(entry.parameter.device)


class _Noise:
    """The noise of a target layer's tensors as a source of rows."""

    def __init__(self, layer_map: LayerMap, shapes: dict[str, tuple[int, ...]]) -> None:
        self.layer_map, self.shapes = layer_map, shapes

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        target, suffix = split_layer(name)
        shape = self.shapes[name]
        return noise_rows(making(self.layer_map, target, suffix, len(shape)), shape, start, stop, dim)


def _changed(module: nn.Module, layer_map: LayerMap) -> Iterator[_Changed]:
    for name, parameter in module.named_parameters():
        rule, position = rule_of(name, module.arch)
        if position is None:
            continue
        target = module.decoder.layers[position].layer_number - 1
        suffix = split_layer(hf_names(rule, target)[0])[1]
        if layer_map.targets[target] is None:
            continue
        recipe = making(layer_map, target, suffix, parameter.dim())
        if not recipe.plain:
            yield _Changed(parameter, rule, recipe, module.arch, parameter.data)
