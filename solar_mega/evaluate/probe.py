"""What a layer map does to a model before any training: losses and seams of all maps from one loaded source.

No grown model is built or written. The source's layers are applied to hidden states in the order that a map
says, and everything that maps share is computed once:

    trunk            h_0 -> layer 0 -> h_1 -> ... -> h_n         the source itself; every h_k is kept
    dus:m            starts at h_{n-m}, then layers m .. n-1     its first n - m layers are the trunk's
    others           start where they leave the order of the source

All branches then walk through the source together, pass by pass: in each pass every layer is fetched at most
once and applied to all branches that wait for it. One pass serves every m, so a scan over all of them takes
about half the arithmetic of growing them, and two readings of the weights; which is why the weights need not
fit into memory (`Layers`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from solar_mega.depth.layer_map import LayerMap, Seam
from solar_mega.errors import Problems
from solar_mega.evaluate.probe_layers import Layers


@dataclass(frozen=True)
class Text:
    """Windows of a text, cut for next-token prediction."""

    tokens: Tensor
    """[windows, s] int64."""

    labels: Tensor
    """[windows, s] int64: the token after each."""


@dataclass(frozen=True)
class LayerFacts:
    """What one layer of the source does, as means over tokens."""

    layer: int
    cosine: float
    """Cosine of the angle between the layer's input and its output."""

    update: float
    """|output - input| / |input|."""

    norm: float
    """|input|, in the residual stream's unit."""


@dataclass(frozen=True)
class SeamFacts:
    """How unlike what arrives at a seam is to what the layer behind it saw in the source; means over
    tokens."""

    position: int
    """Target layer behind the seam."""

    before: int | None
    after: int
    """Source layers on either side."""

    cosine: float
    norm_ratio: float
    """|arriving| / |expected|."""

    distance: float
    """|arriving - expected| / |expected|."""


@dataclass(frozen=True)
class MapFacts:
    """One layer map."""

    spelling: str
    layers: int
    loss: float
    """Mean over tokens, nats, before any training."""

    seams: tuple[SeamFacts, ...]

    @property
    def worst(self) -> SeamFacts | None:
        """The seam with the smallest cosine."""
        return min(self.seams, key=lambda seam: seam.cosine, default=None)


@dataclass(frozen=True)
class Probe:
    """Everything measured."""

    loss: float
    """Of the source, nats per token."""

    layers: tuple[LayerFacts, ...]
    maps: tuple[MapFacts, ...]
    applied: int
    """Layers applied to the text, for all maps together."""

    fetched: int
    """Times a layer's weights were read."""


def probe(
    layers: Layers,
    text: Text,
    maps: Sequence[LayerMap],
    micro_batch: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Probe:
    """Measures the source and every map on `text`.

    Args:
        layers: the source's weights.
        micro_batch: windows that go through a layer at a time.
        advance: called with the number of layers applied (`work` says how many there will be).

    Raises UserError for maps with fresh layers, which have no weights to measure.
    """
    check(maps)
    run = _Run(layers, text, micro_batch, advance)
    trunk, facts = run.trunk()
    branches = [_Branch.start(layer_map, trunk) for layer_map in maps]
    for branch in branches:
        run.measure_seam(branch, trunk)
    while any(not branch.done for branch in branches):
        for layer in range(layers.count):
            for branch in branches:
                while not branch.done and branch.home == layer:
                    run.step(branch)
                    run.measure_seam(branch, trunk)
    results = []
    for branch in branches:
        loss = run.loss(branch.state)
        results.append(MapFacts(str(branch.map), len(branch.map), loss, tuple(branch.seams)))
    return Probe(run.loss(trunk[-1]), facts, tuple(results), run.applied, layers.fetched)


def work(count: int, maps: Sequence[LayerMap]) -> int:
    """Layers that `probe` will apply, for a source of `count` layers."""
    return count + sum(len(layer_map) - _shared(layer_map) for layer_map in maps)


def states_kept(count: int, maps: Sequence[LayerMap]) -> int:
    """Hidden states of the whole text that `probe` holds at a time: the trunk's, and one per branch."""
    return count + 1 + len(maps)


def check(maps: Sequence[LayerMap]) -> None:
    """Raises UserError listing the maps that cannot be probed."""
    problems = Problems()
    for layer_map in maps:
        if layer_map.fresh:
            problems.add(f"{layer_map}: layers {list(layer_map.fresh)[:8]} are fresh and have no weights")
    problems.raise_if_any("probe")


def _shared(layer_map: LayerMap) -> int:
    """Target layers at the beginning that are the source's own, unchanged."""
    count = 0
    for target, modifier in zip(layer_map.targets, layer_map.modifiers, strict=True):
        if target != count or modifier.changes_weights or count == layer_map.source_layers:
            break
        count += 1
    return count


@dataclass
class _Branch:
    """A map on its way: `state` is the input of target layer `position`."""

    map: LayerMap
    position: int
    state: Tensor
    pending: dict[int, Seam]
    seams: list[SeamFacts] = field(default_factory=list)

    @classmethod
    def start(cls, layer_map: LayerMap, trunk: Sequence[Tensor]) -> "_Branch":
        position = _shared(layer_map)
        pending = {seam.position: seam for seam in layer_map.seams if seam.after is not None}
        return cls(layer_map, position, trunk[position], pending)

    @property
    def done(self) -> bool:
        return self.position == len(self.map)

    @property
    def home(self) -> int:
        """The source layer in whose turn the next target layer is applied."""
        return self.map.sources_of(self.position)[0]


class _Run:
    def __init__(self, layers: Layers, text: Text, micro_batch: int, advance: Callable[[int], None]) -> None:
        self.layers, self.text, self.micro_batch, self.advance = layers, text, micro_batch, advance
        self.applied = 0

    @torch.no_grad()
    def trunk(self) -> tuple[list[Tensor], tuple[LayerFacts, ...]]:
        """h_0 .. h_n, each [s, windows, h] fp32, and what each layer does."""
        parts = [self.layers.embed(tokens) for tokens in self.text.tokens.split(self.micro_batch)]
        states, facts = [torch.cat(parts, dim=1)], []
        for layer in range(self.layers.count):
            states.append(self._apply(self.layers.source_layer(layer), states[-1]))
            facts.append(_layer_facts(layer, states[-2], states[-1]))
        return states, tuple(facts)

    @torch.no_grad()
    def step(self, branch: _Branch) -> None:
        """Applies the branch's next layer."""
        if branch.map.modifiers[branch.position].is_identity_block:
            self._count()
        else:
            module = self.layers.target_layer(branch.map, branch.position)
            branch.state = self._apply(module, branch.state)
        branch.position += 1

    @torch.no_grad()
    def measure_seam(self, branch: _Branch, trunk: Sequence[Tensor]) -> None:
        """Notes the seam before the branch's next layer, where there is one."""
        seam = branch.pending.pop(branch.position, None)
        if seam is None:
            return
        arriving, expected = branch.state, trunk[seam.after]
        branch.seams.append(
            SeamFacts(
                seam.position,
                seam.before,
                seam.after,
                cosine=_mean(torch.cosine_similarity, arriving, expected),
                norm_ratio=_mean(lambda x, y: x.norm(dim=-1) / y.norm(dim=-1), arriving, expected),
                distance=_mean(lambda x, y: (x - y).norm(dim=-1) / y.norm(dim=-1), arriving, expected),
            )
        )

    @torch.no_grad()
    def loss(self, state: Tensor) -> float:
        """Mean next-token loss of a last hidden state, nats."""
        total = 0.0
        parts = zip(
            state.split(self.micro_batch, dim=1), self.text.labels.split(self.micro_batch), strict=True
        )
        for part, labels in parts:
            total += self.layers.losses(part, labels).double().sum().item()
        return total / self.text.labels.numel()

    def _apply(self, module: torch.nn.Module, state: Tensor) -> Tensor:
        parts = [self.layers.forward(module, part) for part in state.split(self.micro_batch, dim=1)]
        self._count()
        return torch.cat(parts, dim=1)

    def _count(self) -> None:
        self.applied += 1
        self.advance(1)


def _layer_facts(layer: int, before: Tensor, after: Tensor) -> LayerFacts:
    return LayerFacts(
        layer,
        cosine=_mean(torch.cosine_similarity, before, after),
        update=_mean(lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1), before, after),
        norm=before.norm(dim=-1).mean().item(),
    )


def _mean(measure: Callable[..., Tensor], x: Tensor, y: Tensor) -> float:
    """Mean over all tokens of what `measure` gives per token; states are [s, windows, h], taken window by
    window so that no third state of their size is made."""
    values = [_per_token(measure, a, b) for a, b in _windows(x, y)]
    return torch.cat(values).double().mean().item()


def _per_token(measure: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    if measure is torch.cosine_similarity:
        return torch.cosine_similarity(x, y, dim=-1).flatten()
    return measure(x, y).flatten()


def _windows(*states: Tensor) -> Iterator[Any]:
    return zip(*(state.unbind(1) for state in states), strict=True)
