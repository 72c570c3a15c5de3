"""How a layer map is written: one growth operator, then any number of changes.

    identity                 the source as it is
    dus:M                    depth up-scaling, 0..n-M-1 then M..n-1
    stack:G                  the whole model G times
    interleave:G[@A-B]       every layer (of A-B) G times in place: 0,0,1,1,...
    repeat:A-B[xG]           the range A-B G times in a row (twice unless said)
    llama-pro:K              after each of K groups a copy of its last layer that starts as the identity
    append:K                 the last layer K times more, starting as the identity
    mean[:A-B]               between every two neighbours a layer that is their mean
    slices:0-24,8-32         ranges one after the other, as mergekit's layer_range
    0,1,1~2,2                one origin per target layer; 1~2 is the mean of layers 1 and 2
    recipe.yaml              mergekit's passthrough recipe

    +scale:S[@WHERE]         both output projections times S; also +o_proj:S, +down_proj:S
    +noise:STD[:SEED][@WHERE]
    +freeze[@WHERE]

A-B is half-open: the end is not included. WHERE names target layers: a layer, A-B, several with commas,
`copies` (layers that a source layer does not open, means among them) or `originals` (the others); without it
all are meant.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from solar_mega.depth.drawing import name, ranges
from solar_mega.depth.layer_map import KEY, MAX_LAYERS, LayerMap, depth_up_scaling, shorten
from solar_mega.depth.modifiers import IDENTITY_BLOCK, PLAIN, Modifier
from solar_mega.depth.operators import (
    Source,
    append,
    interleave,
    llama_pro,
    mean_of_neighbours,
    repeat,
    stack,
)
from solar_mega.errors import Problems, UserError

SPELLINGS = (
    "identity",
    "dus:M",
    "stack:G",
    "interleave:G[@A-B]",
    "repeat:A-B[xG]",
    "llama-pro:K",
    "append:K",
    "mean[:A-B]",
    "slices:0-24,8-32",
    "a list such as 0,1,2,1,2,3 (1~2 is a mean)",
    "a mergekit recipe.yaml",
)
CHANGES = ("+scale:S", "+o_proj:S", "+down_proj:S", "+noise:STD[:SEED]", "+freeze")
_KINDS = ("identity", "dus", "stack", "interleave", "repeat", "llama-pro", "append", "mean", "slices")
_RANGE = re.compile(r"(\d{1,9})\s*-\s*(\d{1,9})")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", re.IGNORECASE)

_Grown = tuple[Sequence[Source], Sequence[int]]
"""Targets, and those of them that start as the identity."""


def read(text: str, n: int) -> LayerMap:
    """The map that `text` spells for a model of n layers; `LayerMap.parse` says what is raised."""
    spelling = text.strip()
    problems = Problems()
    heading = f'{KEY} = "{shorten(spelling)}" on a model of {n} layers'
    recipe = re.fullmatch(r"(.+\.ya?ml)((?:\+.*)?)", spelling, re.DOTALL)
    if recipe:
        from solar_mega.depth.mergekit import read_recipe

        base = read_recipe(Path(recipe[1]), n)
        targets, modifiers, changes = base.targets, list(base.modifiers), recipe[2].split("+")[1:]
    else:
        growth, *changes = spelling.split("+")
        targets, added = _read_growth(growth.strip(), n, problems)
        problems.raise_if_any(heading)
        modifiers = [PLAIN] * len(targets)
        for layer in added:
            modifiers[layer] = IDENTITY_BLOCK
    for change in changes:
        _apply(change.strip(), targets, modifiers, problems)
    problems.raise_if_any(heading)
    return LayerMap(n, tuple(targets), "" if recipe else spelling, tuple(modifiers))


def spell(layer_map: LayerMap) -> str:
    """The shortest spelling of a map that was made by arithmetic, not written by a person."""
    return _spell_targets(layer_map.targets, layer_map.source_layers) + _spell_changes(layer_map.modifiers)


def _spell_targets(targets: tuple[Source, ...], n: int) -> str:
    whole = tuple(range(n))
    if targets == whole:
        return "identity"
    if len(targets) % n == 0 and targets == whole * (len(targets) // n):
        return f"stack:{len(targets) // n}"
    m = n - len(targets) // 2
    if len(targets) % 2 == 0 and 0 <= m < n and targets == depth_up_scaling(n, m):
        return f"dus:{m}"
    return ",".join(map(name, targets))


def _spell_changes(modifiers: Sequence[Modifier]) -> str:
    places: dict[str, list[int]] = {}
    for g, modifier in enumerate(modifiers):
        said = []
        if modifier.o_proj == modifier.down_proj != 1:
            said.append(f"scale:{_number(modifier.o_proj)}")
        else:
            scales = (("o_proj", modifier.o_proj), ("down_proj", modifier.down_proj))
            said += [f"{key}:{_number(value)}" for key, value in scales if value != 1]
        if modifier.noise:
            said.append(f"noise:{_number(modifier.noise)}:{modifier.noise_seed}")
        said += ["freeze"] if modifier.freeze else []
        for change in said:
            places.setdefault(change, []).append(g)
    texts = []
    for change, layers in places.items():
        where = ",".join(str(a) if b - a == 1 else f"{a}-{b}" for a, b in ranges(layers))
        texts.append(f"+{change}" + ("" if len(layers) == len(modifiers) else f"@{where}"))
    return "".join(texts)


def _number(value: float) -> str:
    """The shortest text that reads back as `value`; without a plus, which starts the next change."""
    return repr(value).removesuffix(".0").replace("e+", "e")


def _read_growth(text: str, n: int, problems: Problems) -> _Grown:
    """What the growth operator spells. With anything added to `problems` the result is meaningless."""
    kind, colon, argument = (part.strip() for part in text.partition(":"))
    if re.match(r"[-\d,]", text):
        return _read_list(text, n, problems), ()
    if kind == "identity" and not colon:
        return range(n), ()
    if kind == "slices":
        layers: list[int] = []
        for start, stop in _read_ranges(argument, n, problems):
            layers.extend(range(start, stop))
        return layers, ()
    if kind in ("dus", "stack", "llama-pro", "append"):
        if not re.fullmatch(r"-?\d{1,9}", argument):
            allowed = "allowed: " + ", ".join(SPELLINGS)
            problems.add(f'"{kind}" needs a whole number after the colon, got "{argument}"; {allowed}')
            return (), ()
        return _read_count(kind, int(argument), n, problems)
    if kind in ("interleave", "repeat", "mean"):
        return _read_ranged(kind, argument, n, problems), ()
    near = difflib.get_close_matches(kind, _KINDS, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    problems.add(f"not a spelling of a layer map{hint}; allowed: {', '.join(SPELLINGS)}")
    return (), ()


def _read_count(kind: str, count: int, n: int, problems: Problems) -> _Grown:
    try:
        if kind == "dus":
            return depth_up_scaling(n, count), ()
        if kind == "llama-pro":
            return llama_pro(n, count)
    except UserError as error:
        problems.add(str(error))
        return (), ()
    if kind == "append":
        if 1 <= count <= MAX_LAYERS - n:
            return append(n, count)
        problems.add(f"{count} layers cannot be appended; the number must be from 1 to {MAX_LAYERS - n}")
        return (), ()
    if _copies_fit("the model", count, n, n, problems):
        return stack(n, count), ()
    return (), ()


def _read_ranged(kind: str, argument: str, n: int, problems: Problems) -> Sequence[Source]:
    """interleave:G[@A-B], repeat:A-B[xG] and mean[:A-B]."""
    forms = {
        "interleave": r"(?P<copies>-?\d{1,9})(\s*@(?P<range>.*))?",
        "repeat": r"(?P<range>[^x]*)(x\s*(?P<copies>-?\d{1,9}))?",
        "mean": r"(?P<range>.*)",
    }
    match = re.fullmatch(forms[kind], argument, re.DOTALL)
    if not match:
        spelled = next(entry for entry in SPELLINGS if entry.startswith(kind))
        problems.add(f'"{kind}:{argument}" is not {spelled}, with G a whole number and A-B a range')
        return ()
    given = match["range"] if kind == "repeat" else (match["range"] or f"0-{n}")
    before = len(problems.texts)
    found = _read_ranges(given, n, problems)
    if len(problems.texts) > before:
        return ()
    if len(found) != 1:
        problems.add(f'"{kind}" takes one range, got "{given}"')
        return ()
    start, stop = found[0]
    if kind == "mean":
        return mean_of_neighbours(n, start, stop)
    copies = int(match["copies"] or 2)
    if not _copies_fit(f"layers {start}-{stop}", copies, stop - start, n, problems):
        return ()
    return interleave(n, copies, start, stop) if kind == "interleave" else repeat(n, start, stop, copies)


def _copies_fit(what: str, count: int, size: int, n: int, problems: Problems) -> bool:
    most = (MAX_LAYERS - n) // size + 1
    if 1 <= count <= most:
        return True
    problems.add(
        f"{what} cannot be stacked {count} times: the number of copies must be from 1 to {most} "
        f"(at most {MAX_LAYERS} layers)"
    )
    return False


def _read_list(text: str, n: int, problems: Problems) -> Sequence[Source]:
    layers: list[Source] = []
    for entry in (part.strip() for part in text.split(",")):
        numbers = [part.strip() for part in entry.split("~")]
        if re.fullmatch(r"\d{1,9}\s*(-|\.\.)\s*\d{1,9}", entry):
            first, last = re.findall(r"\d+", entry)
            problems.add(
                f'"{entry}" is a range, and a list names single layers; '
                f"write slices:{first}-{int(last) + 1} if {last} is the last layer (the end is not included)"
            )
        elif not all(re.fullmatch(r"\d{1,9}", number) for number in numbers):
            problems.add(f'"{entry}" is not a layer number')
        elif any(int(number) >= n for number in numbers):
            problems.add(f"layer {entry} does not exist; layers are 0 to {n - 1}")
        else:
            layers.append(tuple(map(int, numbers)) if len(numbers) > 1 else int(entry))
    return layers


def _read_ranges(text: str, n: int, problems: Problems) -> list[tuple[int, int]]:
    found = []
    for entry in (part.strip() for part in text.split(",")):
        match = _RANGE.fullmatch(entry)
        if not match:
            example = f"0-{max(1, n - 1)},{min(1, n - 1)}-{n}"
            problems.add(f'"{entry}" is not a slice; write START-END, for example slices:{example}')
            continue
        start, stop = int(match[1]), int(match[2])
        if stop > n:
            problems.add(f"slice {entry} ends after the last layer; an end, not included, is at most {n}")
        elif start >= stop:
            problems.add(f"slice {entry} is empty; the end is not included, so it must be above the start")
        else:
            found.append((start, stop))
    return found


def _apply(text: str, targets: Sequence[Source], modifiers: list[Modifier], problems: Problems) -> None:
    """One change, `scale:0.5@24-48` say, to the modifiers of the layers it names."""
    said, at, where = (part.strip() for part in text.partition("@"))
    kind, _, argument = (part.strip() for part in said.partition(":"))
    change = _read_change(kind, argument, problems)
    places = _read_places(where, targets, problems) if at else range(len(targets))
    if change is None:
        return
    for g in places:
        if kind == "noise" and modifiers[g].noise:
            problems.add(f'"+{text}": layer {g} has noise already')
            return
        modifiers[g] = change(modifiers[g])


def _read_change(kind: str, argument: str, problems: Problems) -> Callable[[Modifier], Modifier] | None:
    if kind == "freeze" and not argument:
        return lambda modifier: replace(modifier, freeze=True)
    if kind in ("scale", "o_proj", "down_proj") and _NUMBER.fullmatch(argument):
        factor = float(argument)
        names = ("o_proj", "down_proj") if kind == "scale" else (kind,)
        return lambda modifier: replace(modifier, **{key: getattr(modifier, key) * factor for key in names})
    if kind == "noise":
        deviation, _, seed = (part.strip() for part in argument.partition(":"))
        if _NUMBER.fullmatch(deviation) and re.fullmatch(r"\d{0,18}", seed):
            values = {"noise": float(deviation), "noise_seed": int(seed or 0)}
            return lambda modifier: replace(modifier, **values)
    near = difflib.get_close_matches(kind, [entry[1:].partition(":")[0] for entry in CHANGES], n=1)
    given = f"+{kind}:{argument}" if argument else f"+{kind}"
    hint = f' (did you mean "{near[0]}"?)' if near and near[0] != kind else ""
    problems.add(f'"{shorten(given)}" is not a change of layers{hint}; allowed: {", ".join(CHANGES)}')
    return None


def _read_places(where: str, targets: Sequence[Source], problems: Problems) -> Sequence[int]:
    """Target layers named after the @."""
    if where in ("copies", "originals"):
        opened: set[Source] = set()
        copies = []
        for g, target in enumerate(targets):
            if not isinstance(target, int) or target in opened:
                copies.append(g)
            opened.add(target)
        return copies if where == "copies" else [g for g in range(len(targets)) if g not in copies]
    found: set[int] = set()
    for entry in (part.strip() for part in where.split(",")):
        match = _RANGE.fullmatch(entry)
        start, stop = (int(match[1]), int(match[2])) if match else (-1, -1)
        if re.fullmatch(r"\d{1,9}", entry):
            start, stop = int(entry), int(entry) + 1
        if not 0 <= start < stop <= len(targets):
            problems.add(
                f'"@{entry}" names no target layers; write a layer, A-B within 0-{len(targets)}, '
                "copies or originals"
            )
        else:
            found.update(range(start, stop))
    return sorted(found)
