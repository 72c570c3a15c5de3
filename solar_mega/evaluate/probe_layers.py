"""The source's layers as modules, all of them in memory or one at a time from the disk."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from solar_mega.artifact.layer_source import MappedSource, Reader
from solar_mega.checkpoint.names import LAYER_PREFIX, hf_names, rule_of
from solar_mega.config.schema import ParallelConfig, Precision
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture
from solar_mega.model.builder import build_model
from solar_mega.runtime import parallel as ranks


class Layers:
    """Embedding, layers and head of a source model, for running in any order. Process groups must exist
    (a world of one).

    Layers wait in slots; where those are fewer than the layers, the one used longest ago makes room. Layers
    that a map changes (means, scales, noise) are made anew each time they are asked for, in a slot of their
    own. A slot is built for layers with a sliding window or for layers without, so both kinds have theirs.
    """

    def __init__(
        self, reader: Reader, arch: Architecture, precision: Precision, resident: int, positions: int
    ) -> None:
        """
        Args:
            reader: the source's tensors by Hugging Face name.
            arch: of the source.
            resident: layers of each kind kept in memory; at least 1.
            positions: longest sequence.
        """
        self.reader, self.arch = reader, arch
        self.count = arch.num_layers
        self.fetched = 0
        self.kinds = arch.windowed or (False,) * self.count
        distinct = sorted(set(self.kinds))
        slots = self.kinds if resident >= self.count else tuple(distinct * max(1, resident))
        self._free = {kind: [i for i, slot in enumerate(slots) if slot == kind] for kind in distinct}
        self._changed = {kind: len(slots) + i for i, kind in enumerate(distinct)}
        self._held: dict[int, int] = {}  # source layer -> slot, used longest ago first
        windowed = (*slots, *distinct) if arch.windowed else ()
        small = replace(arch, num_layers=len(slots) + len(distinct), windowed=windowed)
        (self.model,) = build_model(small, ParallelConfig(), precision, max_sequence_length=positions)
        self.model.eval().requires_grad_(False)
        self._identity = LayerMap(self.count, tuple(range(self.count)))
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
            slot = self._empty_slot(self.kinds[layer])
            self._load(slot, self._identity, layer)
        self._held[layer] = slot
        return self.model.decoder.layers[slot]

    def target_layer(self, layer_map: LayerMap, target: int) -> nn.Module:
        """Target layer `target` of a map, with its changes. Valid until the next one is asked for."""
        origins, modifier = layer_map.sources_of(target), layer_map.modifiers[target]
        if len(origins) == 1 and not modifier.changes_weights:
            return self.source_layer(origins[0])
        slot = self._changed[self.kinds[origins[0]]]
        self._load(slot, layer_map, target)
        return self.model.decoder.layers[slot]

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

    def _empty_slot(self, kind: bool) -> int:
        if self._free[kind]:
            return self._free[kind].pop()
        return self._held.pop(next(layer for layer in self._held if self.kinds[layer] == kind))

    def _load(self, slot: int, layer_map: LayerMap, target: int) -> None:
        self.fetched += 1
        for name, parameter in self.model.decoder.layers[slot].named_parameters():
            self._fill(f"{LAYER_PREFIX}0.{name}", parameter, layer_map, target)

    @torch.no_grad()
    def _fill(self, name: str, parameter: nn.Parameter, layer_map: LayerMap, target: int | None) -> None:
        rule, _ = rule_of(name, self.arch)
        source = MappedSource(self.reader, layer_map)
        parameter.copy_(rule.packing.read(source, hf_names(rule, target), self.arch, 0, 1))
