"""LayerMap: which source layer every layer of a deeper model starts from, and what is changed on the way.

The paper's depthwise scaling (arXiv 2312.15166, section 2) as a value: immutable, comparable, printable,
free of torch. Everything that has to know about depth - loading, exporting, optimizer states, config
files, model cards - takes a LayerMap, and nothing else describes depth.

    dus:M               depth up-scaling: 0..n-M-1 then M..n-1                s = 2 (n - M)

Its rivals are in `operators`, the spellings of all in `spelling`, changes of single layers in `modifiers`.
Layers are counted from 0, in the source and in the target.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from solar_mega.depth.modifiers import PLAIN, Modifier
from solar_mega.depth.operators import Source
from solar_mega.errors import Problems, UserError

MAX_LAYERS = 4096
KEY = "model.layer_map (--layer-map)"

T = TypeVar("T")


class Seam(NamedTuple):
    """A place where a layer does not follow the source layer it followed in the source model."""

    position: int
    """Target index of the first layer after the seam (n - m for `dus:m`)."""

    before: int | None
    """Source layer of the target layer just before the seam; None where that one is fresh or a mean."""

    after: int | None
    """Source layer of the target layer just after the seam; None where that one is fresh or a mean."""

    @property
    def distance(self) -> int | None:
        """The paper's layer distance: difference of the two layers' indices in the base model.

        1 everywhere inside a model, n - 1 at the seam of two whole copies, |n - 1 - 2m| for `dus:m`.
        None next to a fresh layer or a mean, which have no index.
        """
        return None if self.before is None or self.after is None else abs(self.after - self.before)


class Run(NamedTuple):
    """Consecutive target layers that are consecutive in the source too, or are all fresh (source None).
    A mean of layers is a run of its own."""

    target: int
    source: Source
    length: int


def depth_up_scaling(n: int, m: int) -> tuple[int, ...]:
    """Source layers of depthwise scaling: the last m layers of the model and the first m of its duplicate go,
    and what is left is joined: s = 2 (n - m) layers (paper, section 2).

    m = 0 is plain doubling (layer distance n - 1 at the seam); m = n/2 gives the source back; beyond that
    middle layers are dropped and the result is shallower than the source.

    Raises UserError unless 0 <= m < n: with m = n nothing is left of either copy.
    """
    if not 0 <= m < n:
        raise UserError(
            f"m = {m} layers cannot be removed from each of two copies of {n} layers: m must be from 0 to "
            f"{n - 1} (0 is plain doubling; the paper takes 8 of 32)"
        )
    return (*range(n - m), *range(m, n))


@dataclass(frozen=True)
class LayerMap:
    """One origin per target layer. Maps are equal when they do the same, however they are spelled."""

    source_layers: int
    """Layers of the source model, n."""

    targets: tuple[Source, ...]
    """Origin of each target layer: a source layer, a tuple of them whose weights are averaged (a layer may
    stand in it more than once), or None where the target layer starts from fresh weights."""

    spelling: str = field(default="", compare=False)
    """What was written, or the shortest spelling of the map; `parse` reads it unless a layer is fresh."""

    modifiers: tuple[Modifier, ...] = ()
    """One per target layer; empty means that all are plain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(map(_canonical, self.targets)))
        object.__setattr__(self, "modifiers", tuple(self.modifiers) or (PLAIN,) * len(self.targets))
        problems = Problems()
        if self.source_layers < 1:
            problems.add(f"the source has {self.source_layers} layers; it needs at least 1")
        if not self.targets:
            problems.add("no layer is left; a map needs at least one target layer")
        if len(self.targets) > MAX_LAYERS:
            problems.add(f"{len(self.targets)} target layers; at most {MAX_LAYERS} are allowed")
        if len(self.modifiers) != len(self.targets):
            problems.add(f"{len(self.modifiers)} modifiers for {len(self.targets)} target layers")
        named = {layer for target in self.targets for layer in layers_of(target)}
        wrong = sorted(layer for layer in named if not 0 <= layer < self.source_layers)
        if wrong:
            shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            problems.add(f"source layer {shown} does not exist; layers are 0 to {self.source_layers - 1}")
        for modifier in dict.fromkeys(self.modifiers):
            problems.texts += modifier.problems()
        given = shorten(self.spelling or ",".join(map(str, self.targets)))
        problems.raise_if_any(f'{KEY} = "{given}" on a model of {self.source_layers} layers')
        if not self.spelling:
            from solar_mega.depth.spelling import spell

            object.__setattr__(self, "spelling", spell(self))

    @classmethod
    def parse(cls, text: str, source_layers: int) -> "LayerMap":
        """The map that `text` spells for a model of `source_layers` layers.

        Raises UserError naming every problem of the spelling, what was given and what is allowed.
        """
        from solar_mega.depth.spelling import read

        return read(text, source_layers)

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[Source]:
        return iter(self.targets)

    def __getitem__(self, target: int) -> Source:
        return self.targets[target]

    def __str__(self) -> str:
        return self.spelling

    @property
    def is_identity(self) -> bool:
        """The target's weights are the source's, byte for byte; layers may be frozen all the same."""
        return self.targets == tuple(range(self.source_layers)) and not self.changed

    @property
    def preserves_function(self) -> bool:
        """The grown model computes exactly what the source computes: what is left after layers that start as
        the identity is the source itself, unchanged."""
        pairs = zip(self.targets, self.modifiers, strict=True)
        left = [(target, modifier) for target, modifier in pairs if not modifier.is_identity_block]
        return [target for target, _ in left] == list(range(self.source_layers)) and not any(
            modifier.changes_weights for _, modifier in left
        )

    @property
    def fresh(self) -> tuple[int, ...]:
        """Target layers that start from fresh weights."""
        return tuple(g for g, source in enumerate(self.targets) if source is None)

    @property
    def changed(self) -> tuple[int, ...]:
        """Target layers with weights that no source layer has: averaged, scaled or noised."""
        pairs = enumerate(zip(self.targets, self.modifiers, strict=True))
        return tuple(g for g, (t, modifier) in pairs if isinstance(t, tuple) or modifier.changes_weights)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Target layers that are not trained."""
        return tuple(g for g, modifier in enumerate(self.modifiers) if modifier.freeze)

    def sources_of(self, target: int) -> tuple[int, ...]:
        """The source layers that a target layer is copied (one) or averaged (several) from; empty if
        fresh."""
        return layers_of(self.targets[target])

    @property
    def seams(self) -> tuple[Seam, ...]:
        """Every place where the order of the source is broken, in order."""
        pairs = zip(self.targets, self.targets[1:], strict=False)
        return tuple(
            Seam(g, _single(a), _single(b)) for g, (a, b) in enumerate(pairs, 1) if not _follows(a, b)
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The map cut at its seams."""
        starts = [0, *(seam.position for seam in self.seams), len(self)]
        return tuple(Run(a, self.targets[a], b - a) for a, b in zip(starts, starts[1:], strict=False))

    def copies_of(self, source: int) -> tuple[int, ...]:
        """Target layers that start from source layer `source` alone; empty when there is none."""
        return tuple(g for g, s in enumerate(self.targets) if s == source)

    def remap_list(self, values: Sequence[T]) -> list[T]:
        """A list with one entry per source layer (`layer_types` of a config), rearranged for the target.

        A fresh layer takes the entry of the layer before it, or after it where none is before. Raises
        UserError when `values` does not have one entry per source layer, no layer has an origin, or a mean is
        over layers whose entries differ.
        """
        if len(values) != self.source_layers:
            raise UserError(f"a per-layer list has {len(values)} entries for {self.source_layers} layers")
        if len(self.fresh) == len(self):
            raise UserError(f"{KEY}: every layer is fresh, so per-layer settings have nothing to come from")
        known = next(values[self.sources_of(g)[0]] for g in range(len(self)) if self.sources_of(g))
        mapped = []
        for g in range(len(self)):
            entries = [values[source] for source in self.sources_of(g)]
            if any(entry != entries[0] for entry in entries):
                raise UserError(
                    f"{KEY}: target layer {g} is the mean of layers {list(self.sources_of(g))}, whose "
                    f"per-layer settings differ: {entries}"
                )
            known = entries[0] if entries else known
            mapped.append(known)
        return mapped

    def compose(self, other: "LayerMap") -> "LayerMap":
        """This map first, then `other` on the model it makes: result[g] = self[other[g]], scales multiplied.

        Raises UserError when `other` was not made for len(self) layers, or when one map cannot say what two
        in a row do: noise in the first, or a mean of layers that are fresh or changed differently.
        """
        if other.source_layers != len(self):
            raise UserError(
                f'"{shorten(other.spelling)}" is a map for {other.source_layers} layers; '
                f'"{shorten(self.spelling)}" makes {len(self)}'
            )
        targets, modifiers = [], []
        for g, target in enumerate(other.targets):
            first = {self.modifiers[layer] for layer in layers_of(target)} or {PLAIN}
            parts = [self.targets[layer] for layer in layers_of(target)]
            alike = len(first) == 1 and (len(parts) == 1 or None not in parts)
            if not alike or any(modifier.noise for modifier in first):
                raise UserError(
                    f'"{shorten(self.spelling)}" and then "{shorten(other.spelling)}": target layer {g} is '
                    "made in two steps that one map cannot say (noise in the first, or a mean of layers that "
                    "are fresh or changed differently); convert twice"
                )
            targets.append(_mean(parts))
            modifiers.append(other.modifiers[g].after(first.pop()))
        return LayerMap(self.source_layers, tuple(targets), modifiers=tuple(modifiers))

    def to_json(self) -> dict[str, Any]:
        """A dict for json.dump; `from_json` gives an equal map with the same spelling."""
        value = {
            "source_layers": self.source_layers,
            "targets": [list(t) if isinstance(t, tuple) else t for t in self.targets],
            "spelling": self.spelling,
        }
        said = {str(g): m.to_json() for g, m in enumerate(self.modifiers) if m != PLAIN}
        return {**value, "modifiers": said} if said else value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LayerMap":
        """Reads `to_json`. Raises UserError for anything else, unknown keys included: a map written by a
        newer version may say more about its layers, and dropping that would change the model."""
        problems = Problems()
        allowed = {"source_layers": int, "targets": list, "spelling": str}
        said: dict[str, Any] = {}
        if not isinstance(value, dict):
            problems.add(f"expected an object with the keys {', '.join(allowed)}, got {type(value).__name__}")
            value = dict.fromkeys(allowed)
        else:
            for key in sorted(value.keys() - allowed.keys() - {"modifiers"}):
                problems.add(f'unknown key "{key}"; known are {", ".join(allowed)}, modifiers')
            for key, kind in allowed.items():
                if not isinstance(value.get(key), kind) or isinstance(value[key], bool):
                    problems.add(f'"{key}" must be of type {kind.__name__}, got {value.get(key)!r}')
            said = value.get("modifiers", {})
        targets = value["targets"] if isinstance(value.get("targets"), list) else []
        modifiers = [PLAIN] * len(targets)
        _check_targets(targets, problems)
        if not isinstance(said, dict):
            problems.add(f'"modifiers" must be an object, got {said!r}')
            said = {}
        for layer, modifier in said.items():
            if not (layer.isascii() and layer.isdigit() and int(layer) < len(targets)):
                problems.add(f'"modifiers" names the target layer {layer!r}; there are {len(targets)}')
            else:
                modifiers[int(layer)] = Modifier.from_json(modifier, problems)
        problems.raise_if_any("layer map in JSON")
        origins = tuple(tuple(t) if isinstance(t, list) else t for t in targets)
        return cls(value["source_layers"], origins, value["spelling"], tuple(modifiers))

    def summary(self) -> str:
        """One line: layer counts, runs, seams."""
        from solar_mega.depth.drawing import summary

        return summary(self)

    def describe(self) -> str:
        """The map as a person wants to see it: the summary, then each run drawn above the source's layers,
        then how often source layers are used and which layers are changed. ASCII, at most 20 lines."""
        from solar_mega.depth.drawing import describe

        return describe(self)


def layers_of(source: Source) -> tuple[int, ...]:
    """The source layers named by one entry of `targets`."""
    return () if source is None else source if isinstance(source, tuple) else (source,)


def shorten(text: str) -> str:
    """What was given, cut for an error message."""
    return text if len(text) <= 60 else text[:57] + "..."


def _canonical(source: Source) -> Source:
    return source if source is None or isinstance(source, int) else _mean([*source])


def _mean(parts: list[Source]) -> Source:
    """The mean of equally weighted origins as one origin: sorted, in lowest terms."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    share = math.lcm(*(len(layers_of(part)) for part in parts))
    count = Counter(
        layer for part in parts for layer in layers_of(part) * (share // max(1, len(layers_of(part))))
    )
    common = math.gcd(*count.values())
    layers = tuple(layer for layer in sorted(count) for _ in range(count[layer] // common))
    return layers[0] if len(layers) == 1 else layers


def _check_targets(targets: list[Any], problems: Problems) -> None:
    for target in targets:
        layers = target if isinstance(target, list) and len(target) > 1 else [target]
        if target is not None and any(type(layer) is not int for layer in layers):
            problems.add(f'"targets" must hold layer numbers, lists of them and null, got {target!r}')
            return


def _single(source: Source) -> int | None:
    return source if isinstance(source, int) else None


def _follows(before: Source, after: Source) -> bool:
    if before is None or after is None:
        return before is after
    return isinstance(before, int) and isinstance(after, int) and after == before + 1
