"""The source's layers as modules, all of them in memory or one at a time from the disk."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from solar_mega.artifact.layer_source import MappedSource, Reader
from solar_mega.checkpoint.names import LAYER_PREFIX, hf_names, rule_of
from solar_mega.config.schema import ParallelConfig, Precision
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.builder import build_model
from solar_mega.runtime import parallel as ranks


class Layers:
    """Embedding, layers and head of a source model, for running in any order. Process groups must exist
    (a world of one).

    Layers wait in as many slots as `resident` says; with fewer slots than layers the one used longest ago
    makes room. Layers that a map changes (means, scales, noise) are made anew each time they are asked for,
    in a slot of their own.
    """

    def __init__(
        self, reader: Reader, arch: Architecture, precision: Precision, resident: int, positions: int
    ) -> None:
        """
        Args:
            reader: the source's tensors by Hugging Face name.
            arch: of the source.
            resident: layers kept in memory; at least 1.
            positions: longest sequence.

        Raises UserError when the layers of the source differ in kind and are not all resident: a slot is
        built for one kind.
        """
        self.reader, self.arch = reader, arch
        self.count = arch.num_layers
        self.fetched = 0
        self.slots = min(max(resident, 1), self.count)
        kinds = arch.hf_config.get("layer_types") or []
        if len(set(kinds)) > 1 and self.slots < self.count:
            raise UserError(
                f"layers of {sorted(set(kinds))} cannot share memory: this model is probed with all its "
                "layers resident (--no-stream)"
            )
        small = replace(arch, num_layers=self.slots + 1)  # the last one for layers that a map changes
        (self.model,) = build_model(small, ParallelConfig(), precision, max_sequence_length=positions)
        self.model.eval().requires_grad_(False)
        self._identity = LayerMap(self.count, tuple(range(self.count)))
        self._held: dict[int, int] = {}  # source layer -> slot, used longest ago first
        for name, parameter in self.model.named_parameters():
            if not name.startswith(LAYER_PREFIX):
                self._fill(name, parameter, self._identity, None)

    def embed(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [s, b, h] fp32."""
        tokens = tokens.to(ranks.device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model.embedding(input_ids=tokens, position_ids=positions).float()

    def source_layer(self, layer: int) -> nn.Module:
        """Layer `layer` of the source. Valid until the next one is asked for."""
        if layer in self._held:
            slot = self._held.pop(layer)
        else:
            full = len(self._held) == self.slots
            slot = self._held.pop(next(iter(self._held))) if full else self._free_slot(layer)
            self._load(slot, self._identity, layer)
        self._held[layer] = slot
        return self.model.decoder.layers[slot]

    def target_layer(self, layer_map: LayerMap, target: int) -> nn.Module:
        """Target layer `target` of a map, with its changes. Valid until the next one is asked for."""
        origins, modifier = layer_map.sources_of(target), layer_map.modifiers[target]
        if len(origins) == 1 and not modifier.changes_weights:
            return self.source_layer(origins[0])
        self._load(self.slots, layer_map, target)
        return self.model.decoder.layers[self.slots]

    def forward(self, module: nn.Module, state: Tensor) -> Tensor:
        """[s, b, h] fp32 -> the same, through one layer."""
        output, _ = module(state.to(next(module.parameters()).dtype), attention_mask=None)
        return output.float()

    def losses(self, state: Tensor, labels: Tensor) -> Tensor:
        """Last hidden state [s, b, h], labels [b, s] -> losses [b, s] fp32."""
        model = self.model
        normed = model.decoder.final_layernorm(state.to(next(model.parameters()).dtype))
        tied = model.shared_embedding_or_output_weight() if self.arch.tied_embeddings else None
        return model.output_layer(normed, tied, losses=(labels.to(state.device), None))

    def _free_slot(self, layer: int) -> int:
        """Its own number while every layer has a slot: slots may be built for different kinds of layers."""
        return layer if self.slots == self.count else len(self._held)

    def _load(self, slot: int, layer_map: LayerMap, target: int) -> None:
        self.fetched += 1
        for name, parameter in self.model.decoder.layers[slot].named_parameters():
            self._fill(f"{LAYER_PREFIX}0.{name}", parameter, layer_map, target)

    @torch.no_grad()
    def _fill(self, name: str, parameter: nn.Parameter, layer_map: LayerMap, target: int | None) -> None:
        rule, _ = rule_of(name, self.arch)
        source = MappedSource(self.reader, layer_map)
        parameter.copy_(rule.packing.read(source, hf_names(rule, target), self.arch, 0, 1))
