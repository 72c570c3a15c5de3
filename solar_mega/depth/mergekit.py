"""mergekit's passthrough recipes (https://github.com/arcee-ai/mergekit) as layer maps.

    slices:
      - sources:
          - model: mistralai/Mistral-7B-v0.1
            layer_range: [0, 24]
      - sources:
          - model: mistralai/Mistral-7B-v0.1
            layer_range: [8, 32]
            parameters:
              scale:
                - filter: o_proj
                  value: 0.0
                - filter: down_proj
                  value: 0.0
                - value: 1.0
    merge_method: passthrough

The slices in order; `scale` as the recipes for LLaMA Pro use it, on the source, the slice or the whole: the
first entry whose filter is part of a tensor's name counts. A map has one source, so all slices name the same
model; which one is not looked at. `dtype` and `tokenizer_source` say nothing about layers and are not read.
"""

from pathlib import Path
from typing import Any

from solar_mega.depth.layer_map import LayerMap
from solar_mega.depth.modifiers import Modifier
from solar_mega.errors import Problems, UserError

_OUTPUTS = ("o_proj", "down_proj")


def read_recipe(path: Path, source_layers: int) -> LayerMap:
    """The map of the recipe in a YAML file, for a model of `source_layers` layers.

    Raises UserError listing everything in it that is not a passthrough of one model's layers.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"layer map {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"layer map {path}: not YAML ({' '.join(str(error).split())[:200]})") from None
    problems = Problems()
    layer_map = _read(content, source_layers, problems)
    problems.raise_if_any(f"layer map {path}, as a mergekit recipe for {source_layers} layers")
    return layer_map


def _read(content: Any, n: int, problems: Problems) -> LayerMap | None:
    if not isinstance(content, dict) or not isinstance(content.get("slices"), list):
        problems.add('expected a mapping with a list of "slices"')
        return None
    if content.get("merge_method") != "passthrough":
        problems.add(f'merge_method = {content.get("merge_method")!r}; a layer map is a "passthrough"')
    models: set[str] = set()
    targets: list[int] = []
    modifiers: list[Modifier] = []
    for number, entry in enumerate(content["slices"]):
        where = f"slices[{number}]"
        sources = entry.get("sources") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
            problems.add(f'{where} must have "sources" with exactly one entry')
            continue
        source = sources[0]
        models.add(str(source.get("model")))
        layers = _layer_range(source.get("layer_range"), n, where, problems)
        levels = [level.get("parameters") for level in (source, entry, content)]
        modifier = _modifier(levels, where, problems)
        targets += layers
        modifiers += [modifier] * len(layers)
    if len(models) > 1:
        problems.add(f"the slices name {len(models)} models ({', '.join(sorted(models))}); a map has one")
    if problems.texts:
        return None
    return LayerMap(n, tuple(targets), modifiers=tuple(modifiers))


def _layer_range(value: Any, n: int, where: str, problems: Problems) -> range:
    if not (isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)):
        problems.add(f"{where}: layer_range = {value!r}; write [first, end], the end not included")
    elif not 0 <= value[0] < value[1] <= n:
        problems.add(f"{where}: layer_range = {value} is outside the model's layers, [0, {n}]")
    else:
        return range(*value)
    return range(0)


def _modifier(levels: list[Any], where: str, problems: Problems) -> Modifier:
    """The scales that the parameters of source, slice and recipe (in this order) give."""
    for level in levels:
        if level is None:
            continue
        if not isinstance(level, dict):
            problems.add(f"{where}: parameters must be a mapping, got {level!r}")
            continue
        for key in level.keys() - {"scale"}:
            problems.add(f"{where}: the parameter {key!r} means nothing to passthrough; known is scale")
        if "scale" in level:
            return _scales(level["scale"], where, problems)
    return Modifier()


def _scales(value: Any, where: str, problems: Problems) -> Modifier:
    entries = value if isinstance(value, list) else [{"value": value}]
    found: dict[str, float] = {}
    rest = 1.0
    for entry in entries:
        number = entry.get("value") if isinstance(entry, dict) else None
        if type(number) not in (int, float):
            problems.add(f"{where}: scale = {entry!r}; write numbers, as value or as filter and value")
            return Modifier()
        wanted = entry.get("filter")
        if wanted in (None, "*"):
            rest = float(number)
            break
        if wanted not in _OUTPUTS:
            problems.add(
                f"{where}: scale with filter {wanted!r} is not supported; {' and '.join(_OUTPUTS)} are"
            )
        else:
            found.setdefault(wanted, float(number))
    if rest != 1:
        problems.add(
            f"{where}: scale {rest:g} without a filter multiplies every tensor, norms too; filter o_proj and "
            "down_proj"
        )
    return Modifier(**{name: found.get(name, 1.0) for name in _OUTPUTS})
