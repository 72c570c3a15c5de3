"""A layer map as a person wants to see it: one line, or one screen of ASCII."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from solar_mega.depth.modifiers import PLAIN, Modifier
from solar_mega.depth.operators import Source

if TYPE_CHECKING:
    from solar_mega.depth.layer_map import LayerMap, Run, Seam

_BAR = 48  # columns of the drawing's source axis
_ROWS = 11  # runs drawn before the drawing is cut
_CHANGES = 2  # lines of changed layers


def summary(layer_map: "LayerMap") -> str:
    """Layer counts, runs, seams."""
    runs, seams = layer_map.runs, layer_map.seams
    shown = " | ".join(map(_sources, runs[:6])) + (f" | ... ({len(runs)} runs)" if len(runs) > 6 else "")
    line = f"{len(layer_map)} layers from {layer_map.source_layers}: {shown}"
    if not seams:
        return f"{line}, no seam"
    if len(seams) > 3:
        largest = max((s.distance for s in seams if s.distance is not None), default=None)
        reach = "" if largest is None else f", largest layer distance {largest}"
        return f"{line}, {len(seams)} seams{reach}"
    return ", ".join([line, *map(_describe_seam, seams)])


def describe(layer_map: "LayerMap") -> str:
    """The summary, each run drawn above the source's layers, how often source layers are used, and what is
    changed. At most 20 lines."""
    lines = [summary(layer_map), "", *_drawing(layer_map), "", _usage(layer_map), *_changes(layer_map)]
    return "\n".join(line.rstrip() for line in lines)


def _drawing(layer_map: "LayerMap") -> list[str]:
    n = layer_map.source_layers
    columns = min(n, _BAR)
    last = str(n - 1)
    rows = [("target", "source", "0" + last.rjust(columns - 1) if n > 1 else "0")]
    for run in layer_map.runs[:_ROWS]:
        bar = ""
        if run.source is not None:
            first, stop = _extent(run)
            left = first * columns // n
            right = max(left + 1, -(-stop * columns // n))
            bar = " " * left + ("=" if isinstance(run.source, int) else "~") * (right - left)
        rows.append((span(run.target, run.target + run.length), _sources(run), bar))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    drawn = [f"  {a:>{widths[0]}}  {b:>{widths[1]}}  {bar}" for a, b, bar in rows]
    hidden = len(layer_map.runs) - _ROWS
    return drawn if hidden <= 0 else [*drawn, f"  ... and {hidden} more runs"]


def _extent(run: "Run") -> tuple[int, int]:
    if isinstance(run.source, tuple):
        return min(run.source), max(run.source) + 1
    return run.source, run.source + run.length


def _usage(layer_map: "LayerMap") -> str:
    used = Counter(s for g in range(len(layer_map)) for s in set(layer_map.sources_of(g)))
    groups: dict[int, list[int]] = {}
    for source in range(layer_map.source_layers):
        groups.setdefault(used[source], []).append(source)
    words = {0: "dropped", 1: "used once", 2: "used twice"}
    parts = []
    for times in sorted(groups, reverse=True):
        parts.append(f"{words.get(times, f'used {times} times')} {spans(groups[times])}")
    if layer_map.fresh:
        parts.append(f"fresh target layers {spans(layer_map.fresh)}")
    return "source layers: " + "; ".join(parts)


def _changes(layer_map: "LayerMap") -> list[str]:
    """One line per kind of change."""
    groups: dict[Modifier, list[int]] = {}
    for g, modifier in enumerate(layer_map.modifiers):
        if modifier != PLAIN:
            groups.setdefault(modifier, []).append(g)
    lines = [f"target layers {spans(layers)}: {_words(modifier)}" for modifier, layers in groups.items()]
    if len(lines) > _CHANGES:
        lines[_CHANGES - 1 :] = [f"... and {len(lines) - _CHANGES + 1} more kinds of changed layers"]
    return lines


def _words(modifier: Modifier) -> str:
    words = []
    if modifier.is_identity_block:
        words.append("start as the identity (o_proj and down_proj are 0)")
    else:
        for name in ("o_proj", "down_proj"):
            if getattr(modifier, name) != 1:
                words.append(f"{name} x {getattr(modifier, name):g}")
    if modifier.noise:
        words.append(f"noise of {modifier.noise:g} (seed {modifier.noise_seed})")
    return ", ".join([*words, *(["frozen"] if modifier.freeze else [])])


def _sources(run: "Run") -> str:
    if run.source is None:
        return f"{run.length} fresh"
    if isinstance(run.source, tuple):
        return name(run.source)
    return span(run.source, run.source + run.length)


def _describe_seam(seam: "Seam") -> str:
    distance = "" if seam.distance is None else f", layer distance {seam.distance}"
    if seam.before is None and seam.after is None:
        return f"seam after layer {seam.position - 1}"
    return f"seam after layer {seam.position - 1}: source {_end(seam.before)} -> {_end(seam.after)}{distance}"


def _end(source: int | None) -> str:
    return "none" if source is None else str(source)


def name(source: Source) -> str:
    """One origin, as lists spell it: 7, 7~8 for the mean of two layers, or fresh."""
    if source is None:
        return "fresh"
    return "~".join(map(str, source)) if isinstance(source, tuple) else str(source)


def span(start: int, stop: int) -> str:
    """Half-open range, last layer included in the text: 0..7, or 7."""
    return str(start) if stop - start == 1 else f"{start}..{stop - 1}"


def spans(layers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0..7, 24..31."""
    found = ranges(layers)
    return ", ".join(span(a, b) for a, b in found[:8]) + (", ..." if len(found) > 8 else "")


def ranges(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and layer == found[-1][1]:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return found
