"""LayerMap: which source layer every layer of a deeper model starts from.

The paper's depthwise scaling (arXiv 2312.15166, section 2) as a value: immutable, comparable, printable,
free of torch. Everything that has to know about depth - loading, exporting, optimizer states, config
files, model cards - takes a LayerMap, and nothing else describes depth.

    identity            the source as it is
    dus:M               depth up-scaling: 0..n-M-1 then M..n-1                s = 2 (n - M)
    stack:G             the whole model G times                               s = G n
    slices:0-24,8-32    half-open ranges, end not included, as mergekit's layer_range
    0,1,2,1,2,3         one source layer per target layer

Layers are counted from 0, in the source and in the target.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from solar_mega.errors import Problems, UserError

MAX_LAYERS = 4096
SPELLINGS = ("identity", "dus:M", "stack:G", "slices:0-24,8-32", "a list such as 0,1,2,1,2,3")
_KEY = "model.layer_map (--layer-map)"
_KINDS = ("identity", "dus", "stack", "slices")
_BAR = 48  # columns of the drawing's source axis
_ROWS = 12  # runs drawn before the drawing is cut

T = TypeVar("T")


class Seam(NamedTuple):
    """A place where a layer does not follow the source layer it followed in the source model."""

    position: int
    """Target index of the first layer after the seam (n - m for `dus:m`)."""

    before: int | None
    """Source layer of the target layer just before the seam; None where that one is fresh."""

    after: int | None
    """Source layer of the target layer just after the seam; None where that one is fresh."""

    @property
    def distance(self) -> int | None:
        """The paper's layer distance: difference of the two layers' indices in the base model.

        1 everywhere inside a model, n - 1 at the seam of two whole copies, |n - 1 - 2m| for `dus:m`.
        None next to a fresh layer, which has no index.
        """
        return None if self.before is None or self.after is None else abs(self.after - self.before)


class Run(NamedTuple):
    """Consecutive target layers that are consecutive in the source too, or are all fresh (source None)."""

    target: int
    source: int | None
    length: int

    def __str__(self) -> str:
        if self.source is None:
            return f"{self.length} fresh"
        return _span(self.source, self.source + self.length)


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
    """One source layer per target layer. Maps are equal when they do the same, however they are spelled."""

    source_layers: int
    """Layers of the source model, n."""

    targets: tuple[int | None, ...]
    """Source layer of each target layer; None where the target layer starts from fresh weights."""

    spelling: str = field(default="", compare=False)
    """What was written, or the shortest spelling of `targets`; `parse` reads it unless a layer is fresh."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        problems = Problems()
        if self.source_layers < 1:
            problems.add(f"the source has {self.source_layers} layers; it needs at least 1")
        if not self.targets:
            problems.add("no layer is left; a map needs at least one target layer")
        if len(self.targets) > MAX_LAYERS:
            problems.add(f"{len(self.targets)} target layers; at most {MAX_LAYERS} are allowed")
        wrong = sorted({t for t in self.targets if t is not None and not 0 <= t < self.source_layers})
        if wrong:
            shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            problems.add(f"source layer {shown} does not exist; layers are 0 to {self.source_layers - 1}")
        given = self.spelling or _shorten(",".join(_name(t) for t in self.targets))
        problems.raise_if_any(f'{_KEY} = "{_shorten(given)}" on a model of {self.source_layers} layers')
        if not self.spelling:
            object.__setattr__(self, "spelling", _spell(self.targets, self.source_layers))

    @classmethod
    def parse(cls, text: str, source_layers: int) -> "LayerMap":
        """The map that `text` spells for a model of `source_layers` layers.

        Raises UserError naming every problem of the spelling, what was given and what is allowed.
        """
        spelling = text.strip()
        problems = Problems()
        targets = _read(spelling, source_layers, problems)
        problems.raise_if_any(f'{_KEY} = "{_shorten(spelling)}" on a model of {source_layers} layers')
        return cls(source_layers, tuple(targets), spelling)

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[int | None]:
        return iter(self.targets)

    def __getitem__(self, target: int) -> int | None:
        return self.targets[target]

    def __str__(self) -> str:
        return self.spelling

    @property
    def is_identity(self) -> bool:
        return self.targets == tuple(range(self.source_layers))

    @property
    def fresh(self) -> tuple[int, ...]:
        """Target layers that start from fresh weights."""
        return tuple(g for g, source in enumerate(self.targets) if source is None)

    @property
    def seams(self) -> tuple[Seam, ...]:
        """Every place where the order of the source is broken, in order."""
        pairs = zip(self.targets, self.targets[1:], strict=False)
        return tuple(Seam(g, a, b) for g, (a, b) in enumerate(pairs, 1) if not _follows(a, b))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The map cut at its seams."""
        starts = [0, *(seam.position for seam in self.seams), len(self)]
        return tuple(Run(a, self.targets[a], b - a) for a, b in zip(starts, starts[1:], strict=False))

    def copies_of(self, source: int) -> tuple[int, ...]:
        """Target layers that start from source layer `source`; empty when it is dropped."""
        return tuple(g for g, s in enumerate(self.targets) if s == source)

    def remap_list(self, values: Sequence[T]) -> list[T]:
        """A list with one entry per source layer (`layer_types` of a config), rearranged for the target.

        A fresh layer takes the entry of the copied layer before it, or after it where none is before.
        Raises UserError when `values` does not have one entry per source layer, or no layer is copied.
        """
        if len(values) != self.source_layers:
            raise UserError(f"a per-layer list has {len(values)} entries for {self.source_layers} layers")
        known = next((s for s in self.targets if s is not None), None)
        if known is None:
            raise UserError(f"{_KEY}: every layer is fresh, so per-layer settings have nothing to come from")
        mapped = []
        for source in self.targets:
            known = known if source is None else source
            mapped.append(values[known])
        return mapped

    def compose(self, other: "LayerMap") -> "LayerMap":
        """This map first, then `other` on the model it makes: result[g] = self[other[g]].

        Raises UserError when `other` was not made for len(self) layers.
        """
        if other.source_layers != len(self):
            raise UserError(
                f'"{_shorten(other.spelling)}" is a map for {other.source_layers} layers; '
                f'"{_shorten(self.spelling)}" makes {len(self)}'
            )
        targets = tuple(None if t is None else self.targets[t] for t in other.targets)
        return LayerMap(self.source_layers, targets)

    def to_json(self) -> dict[str, Any]:
        """A dict for json.dump; `from_json` gives an equal map with the same spelling."""
        return {"source_layers": self.source_layers, "targets": list(self.targets), "spelling": self.spelling}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LayerMap":
        """Reads `to_json`. Raises UserError for anything else, unknown keys included: a map written by a
        newer version may say more about its layers, and dropping that would change the model."""
        problems = Problems()
        allowed = {"source_layers": int, "targets": list, "spelling": str}
        if not isinstance(value, dict):
            problems.add(f"expected an object with the keys {', '.join(allowed)}, got {type(value).__name__}")
            value = dict.fromkeys(allowed)
        else:
            for key in sorted(value.keys() - allowed.keys()):
                problems.add(f'unknown key "{key}"; known are {", ".join(allowed)}')
            for key, kind in allowed.items():
                if not isinstance(value.get(key), kind) or isinstance(value[key], bool):
                    problems.add(f'"{key}" must be of type {kind.__name__}, got {value.get(key)!r}')
            targets = value["targets"] if isinstance(value.get("targets"), list) else []
            wrong = [t for t in targets if t is not None and type(t) is not int]
            if wrong:
                problems.add(f'"targets" must hold layer numbers and null, got {wrong[0]!r}')
        problems.raise_if_any("layer map in JSON")
        return cls(value["source_layers"], tuple(value["targets"]), value["spelling"])

    def summary(self) -> str:
        """One line: layer counts, runs, seams."""
        runs, seams = self.runs, self.seams
        shown = " | ".join(map(str, runs[:6])) + (f" | ... ({len(runs)} runs)" if len(runs) > 6 else "")
        line = f"{len(self)} layers from {self.source_layers}: {shown}"
        if not seams:
            return f"{line}, no seam"
        if len(seams) > 3:
            largest = max((s.distance for s in seams if s.distance is not None), default=None)
            reach = "" if largest is None else f", largest layer distance {largest}"
            return f"{line}, {len(seams)} seams{reach}"
        return ", ".join([line, *map(_describe_seam, seams)])

    def describe(self) -> str:
        """The map as a person wants to see it: the summary, then each run drawn above the source's layers,
        then how often source layers are used. ASCII, at most 20 lines."""
        lines = [self.summary(), "", *self._drawing(), "", self._usage()]
        return "\n".join(line.rstrip() for line in lines)

    def _drawing(self) -> list[str]:
        n = self.source_layers
        columns = min(n, _BAR)
        last = str(n - 1)
        rows = [("target", "source", "0" + last.rjust(columns - 1) if n > 1 else "0")]
        for run in self.runs[:_ROWS]:
            bar = ""
            if run.source is not None:
                left = run.source * columns // n
                right = max(left + 1, -(-(run.source + run.length) * columns // n))
                bar = " " * left + "=" * (right - left)
            rows.append((_span(run.target, run.target + run.length), str(run), bar))
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        drawn = [f"  {a:>{widths[0]}}  {b:>{widths[1]}}  {bar}" for a, b, bar in rows]
        hidden = len(self.runs) - _ROWS
        return drawn if hidden <= 0 else [*drawn, f"  ... and {hidden} more runs"]

    def _usage(self) -> str:
        used = Counter(s for s in self.targets if s is not None)
        groups: dict[int, list[int]] = {}
        for source in range(self.source_layers):
            groups.setdefault(used[source], []).append(source)
        words = {0: "dropped", 1: "used once", 2: "used twice"}
        parts = []
        for times in sorted(groups, reverse=True):
            parts.append(f"{words.get(times, f'used {times} times')} {_spans(groups[times])}")
        if self.fresh:
            parts.append(f"fresh target layers {_spans(self.fresh)}")
        return "source layers: " + "; ".join(parts)


def _follows(before: int | None, after: int | None) -> bool:
    if before is None or after is None:
        return before is after
    return after == before + 1


def _describe_seam(seam: Seam) -> str:
    distance = "" if seam.distance is None else f", layer distance {seam.distance}"
    sources = f"source {_name(seam.before)} -> {_name(seam.after)}"
    return f"seam after layer {seam.position - 1}: {sources}{distance}"


def _name(source: int | None) -> str:
    return "fresh" if source is None else str(source)


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}..{stop - 1}"


def _spans(layers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0..7, 24..31."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1]:
            ranges[-1][1] += 1
        else:
            ranges.append([layer, layer + 1])
    shown = ", ".join(_span(a, b) for a, b in ranges[:8])
    return shown + (", ..." if len(ranges) > 8 else "")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _spell(targets: tuple[int | None, ...], n: int) -> str:
    """The shortest spelling of a map that was made by arithmetic, not written by a person."""
    whole = tuple(range(n))
    if targets == whole:
        return "identity"
    if len(targets) % n == 0 and targets == whole * (len(targets) // n):
        return f"stack:{len(targets) // n}"
    m = n - len(targets) // 2
    if len(targets) % 2 == 0 and 0 <= m < n and targets == depth_up_scaling(n, m):
        return f"dus:{m}"
    return ",".join(map(_name, targets))


def _read(text: str, n: int, problems: Problems) -> Sequence[int]:
    """The source layers that `text` spells. With anything added to `problems` the result is meaningless."""
    allowed = "allowed: " + ", ".join(SPELLINGS)
    kind, colon, argument = text.partition(":")
    if re.match(r"[-\d,]", text):
        return _read_list(text, n, problems)
    if kind == "identity" and not colon:
        return range(n)
    if kind == "slices":
        return _read_slices(argument, n, problems)
    if kind in ("dus", "stack"):
        if not re.fullmatch(r"-?\d{1,9}", argument.strip()):
            problems.add(f'"{kind}" needs a whole number after the colon, got "{argument}"; {allowed}')
            return ()
        return _read_count(kind, int(argument), n, problems)
    near = difflib.get_close_matches(kind, _KINDS, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    problems.add(f"not a spelling of a layer map{hint}; {allowed}")
    return ()


def _read_count(kind: str, count: int, n: int, problems: Problems) -> Sequence[int]:
    if kind == "dus":
        try:
            return depth_up_scaling(n, count)
        except UserError as error:
            problems.add(str(error))
            return ()
    if not 1 <= count <= MAX_LAYERS // n:
        problems.add(
            f"the model cannot be stacked {count} times: the number of copies must be from 1 to "
            f"{MAX_LAYERS // n} (at most {MAX_LAYERS} layers)"
        )
        return ()
    return tuple(range(n)) * count


def _read_list(text: str, n: int, problems: Problems) -> Sequence[int]:
    layers = []
    for entry in (part.strip() for part in text.split(",")):
        if re.fullmatch(r"\d{1,9}\s*(-|\.\.)\s*\d{1,9}", entry):
            first, last = re.findall(r"\d+", entry)
            problems.add(
                f'"{entry}" is a range, and a list names single layers; '
                f"write slices:{first}-{int(last) + 1} if {last} is the last layer (the end is not included)"
            )
        elif not re.fullmatch(r"\d{1,9}", entry):
            problems.add(f'"{entry}" is not a layer number')
        elif int(entry) >= n:
            problems.add(f"layer {entry} does not exist; layers are 0 to {n - 1}")
        else:
            layers.append(int(entry))
    return layers


def _read_slices(text: str, n: int, problems: Problems) -> Sequence[int]:
    layers: list[int] = []
    for entry in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,9})\s*-\s*(\d{1,9})", entry)
        if not match:
            example = f"slices:0-{max(1, n - 1)},{min(1, n - 1)}-{n}"
            problems.add(f'"{entry}" is not a slice; write START-END, for example {example}')
            continue
        start, stop = int(match[1]), int(match[2])
        if stop > n:
            problems.add(f"slice {entry} ends after the last layer; an end, not included, is at most {n}")
        elif start >= stop:
            problems.add(f"slice {entry} is empty; the end is not included, so it must be above the start")
        else:
            layers.extend(range(start, stop))
    return layers
