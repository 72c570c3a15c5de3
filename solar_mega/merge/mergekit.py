"""mergekit's YAML, for the methods this project has: the same file gives the same merge.

Read are `merge_method`, `base_model`, `models` or `slices`, `parameters` at every level with gradients and
filters, `dtype` and `out_dtype`, and `tokenizer_source` where it names the base. Everything else is an error:
an option that is silently dropped is another model. Two differences in arithmetic are stated in
docs/merge.md: sums are fp32 whatever `dtype` says, and DARE rescales by 1 / density.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solar_mega.errors import Problems, UserError
from solar_mega.merge.recipe import (
    DEFAULTS,
    METHODS,
    NEEDS_BASE,
    Part,
    Recipe,
    Slice,
    check_recipe,
    required_parameter,
)
from solar_mega.merge.settings import Setting, Settings, read_setting

_TOP = {
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
}
_MERGEKIT_DEFAULTS = {"linear": {"normalize": 1.0}}
"""Where mergekit's default is not ours."""


def read_mergekit(path: Path, seed: int = 0, dtype: str | None = None) -> Recipe:
    """The recipe in a mergekit YAML file. Model paths are directories, relative to the current one.

    Args:
        dtype: safetensors dtype of the result; overrules the file's `out_dtype` and `dtype`.

    Raises UserError listing everything that is not understood.
    """
    content = _load(path)
    problems = Problems()
    for key in sorted(content.keys() - _TOP):
        problems.add(f"{key}: not supported; supported are {', '.join(sorted(_TOP))}")
    method = str(content.get("merge_method", ""))
    if method not in METHODS or method == "delta_slerp":
        known = ", ".join(name for name in METHODS if name != "delta_slerp")
        problems.add(f'merge_method = "{method}": supported are {known}')
        problems.raise_if_any(str(path))
    reader = _Reader(method, problems)
    base = reader.model(content.get("base_model"), "base_model") if content.get("base_model") else None
    slices = reader.slices(content)
    settings = {
        **{name: Setting.constant(v) for name, v in _MERGEKIT_DEFAULTS.get(method, {}).items()},
        **reader.settings(content.get("parameters"), "parameters"),
    }
    _check_tokenizer(content.get("tokenizer_source"), base, problems)
    stored = dtype or _dtype(content, problems)
    recipe = Recipe(method, slices, base, settings, seed, stored, {"mergekit": content, "seed": seed})
    if slices:
        check_recipe(recipe, problems)
    problems.raise_if_any(str(path))
    return recipe


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected keys such as merge_method, got {type(content).__name__}")
    return content


def _dtype(content: Mapping[str, Any], problems: Problems) -> str | None:
    from solar_mega.artifact.cast import weight_dtype

    name = content.get("out_dtype") or content.get("dtype")
    if name is None:
        return None
    try:
        return weight_dtype(str(name), "dtype")
    except UserError as error:
        problems.add(str(error))
        return None


def _check_tokenizer(source: Any, base: Path | None, problems: Problems) -> None:
    if source not in (None, "base") and Path(str(source)) != base:
        problems.add(
            f"tokenizer_source = {source!r}: vocabularies are not merged; the models must share one, and the "
            "result takes that of base_model"
        )


class _Reader:
    def __init__(self, method: str, problems: Problems) -> None:
        self.method, self.problems = method, problems
        self.used = {required_parameter(method), *DEFAULTS[method]}
        self.allowed = self.used | ({"density", "rescale", "int8_mask"} if method in NEEDS_BASE else set())

    def slices(self, content: Mapping[str, Any]) -> tuple[Slice, ...]:
        given = [key for key in ("models", "slices") if content.get(key)]
        if len(given) != 1 or not isinstance(content[given[0]], list):
            self.problems.add("exactly one of models and slices must be given, as a list")
            return ()
        if given == ["models"]:
            parts = [self.part(entry, f"models[{i}]", False) for i, entry in enumerate(content["models"])]
            return (Slice(tuple(part for part in parts if part)),)
        return tuple(self.slice(entry, f"slices[{i}]") for i, entry in enumerate(content["slices"]))

    def slice(self, entry: Any, where: str) -> Slice:
        if not isinstance(entry, dict) or not isinstance(entry.get("sources"), list):
            self.problems.add(f"{where}: needs `sources`, a list")
            return Slice(())
        self.unknown(entry, {"sources", "parameters", "base_model"}, where)
        parts = [
            self.part(source, f"{where}.sources[{i}]", True) for i, source in enumerate(entry["sources"])
        ]
        base = self.model(entry["base_model"], f"{where}.base_model") if entry.get("base_model") else None
        settings = self.settings(entry.get("parameters"), f"{where}.parameters")
        return Slice(tuple(part for part in parts if part), settings, base)

    def part(self, entry: Any, where: str, with_range: bool) -> Part | None:
        if not isinstance(entry, dict):
            self.problems.add(f"{where}: expected `model: ...`, got {entry!r}")
            return None
        self.unknown(entry, {"model", "parameters", *(["layer_range"] if with_range else [])}, where)
        layers = None
        if with_range:
            given = entry.get("layer_range")
            if not (isinstance(given, list) and len(given) == 2 and all(type(x) is int for x in given)):
                self.problems.add(f"{where}: layer_range must be [START, END], got {given!r}")
                return None
            layers = range(*given)
            if not layers or given[0] < 0:
                self.problems.add(f"{where}: layer_range {given} is empty; the end is not included")
        settings = self.settings(entry.get("parameters"), f"{where}.parameters")
        return Part(self.model(entry.get("model"), f"{where}.model"), layers, settings)

    def model(self, value: Any, where: str) -> Path:
        if isinstance(value, dict) and isinstance(value.get("model"), dict):
            value = value["model"].get("path")
        if not isinstance(value, str) or not value:
            self.problems.add(f"{where}: expected the path of a model directory, got {value!r}")
            return Path()
        if "+" in value:
            self.problems.add(f"{where}: adapters ({value}) are not applied; merge them into the model first")
        return Path(value).expanduser()

    def settings(self, given: Any, where: str) -> Settings:
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.problems.add(f"{where}: expected names and values, got {given!r}")
            return {}
        self.unknown(given, self.allowed, where)
        found = {}
        for name, value in given.items():
            if name in self.used:  # the others mean nothing to the method, in mergekit too
                try:
                    found[name] = read_setting(value, f"{where}.{name}")
                except UserError as error:
                    self.problems.add(str(error))
        return found

    def unknown(self, entry: Mapping[str, Any], allowed: set[str], where: str) -> None:
        for key in entry.keys() - allowed:
            self.problems.add(
                f"{where}: {key} is unknown for {self.method}; known: {', '.join(sorted(allowed))}"
            )
