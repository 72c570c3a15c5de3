"""From a recipe to one job per tensor of the result, with everything that can be wrong found before the first
byte is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solar_mega.artifact.cast import CASTABLE
from solar_mega.artifact.hf import grown_config, layer_name, split_layer
from solar_mega.artifact.safetensors_format import DTYPES, TensorInfo, tensor_bytes
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.merge.models import FileTensors, Model, open_model
from solar_mega.merge.recipe import DEFAULTS, NEEDS_BASE, Part, Recipe, Slice, required_parameter
from solar_mega.merge.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from solar_mega.merge.megatron import MegatronTensors

_SHAPING = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
"""config.json keys that must agree; the merged tensors would mean different things."""

_COMPUTING = (
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "layer_types",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
)
"""Keys that change what the same weights compute: the result takes the reference's, and the user is told."""

_SHOWN = 6  # tensors named in one complaint


@dataclass(frozen=True)
class Origin:
    """A source tensor."""

    reader: "FileTensors | MegatronTensors"
    info: TensorInfo


@dataclass(frozen=True)
class Job:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[Origin, ...]
    """Of the models merged, in the recipe's order; for slerp the model at t = 0 first."""

    base: Origin | None
    """For the methods that work on differences."""

    shared: Mapping[str, float]
    """t, normalize, lambda, rescale, density default: the method's parameters at this tensor."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Inputs, then the base where there is one."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


@dataclass(frozen=True)
class MergePlan:
    recipe: Recipe
    models: Mapping[Path, Model] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    """config.json of the result."""

    layers: int
    jobs: tuple[Job, ...] = field(repr=False)
    """In the order they are written: that of the reference's bytes on disk, or of the layers."""

    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def parameters(self) -> int:
        return sum(job.inputs[0].info.elements for job in self.jobs)


def plan_merge(recipe: Recipe) -> MergePlan:
    """Opens the models and checks them against each other.

    Raises UserError listing every problem: directories that are not models, damaged weights, other
    architectures, shapes, vocabularies or tokenizers, tensors that only some have, missing parameters.
    """
    models = _open(recipe.models)
    problems, warnings = Problems(), []
    for text in _shape_problems(recipe, models, warnings):
        problems.add(text)
    problems.raise_if_any("merge")
    slices = tuple(_with_layers(piece, models) for piece in recipe.slices)
    jobs = _Jobs(recipe, models, problems)
    for name in _outside(models, recipe.reference):
        jobs.add(name, slices[0 if "embed" in name else -1], lambda _, name=name: name, 0.0)
    target = 0
    for piece in slices:
        count = len(piece.parts[0].layers)
        for i in range(count):
            position = i / (count - 1) if count > 1 else 1.0
            for suffix in _suffixes(models[piece.parts[0].model], piece.parts[0].layers[i]):
                jobs.add(
                    layer_name(target, suffix),
                    piece,
                    lambda part, i=i, suffix=suffix: layer_name(part.layers[i], suffix),
                    position,
                )
            target += 1
    problems.texts[_SHOWN * 3 :] = [] if len(problems.texts) <= _SHOWN * 3 else ["... and more of the kind"]
    problems.raise_if_any("merge")
    _warn_of_weights(recipe, jobs.done, warnings)
    config = _config(recipe, slices, models)
    ordered = _in_disk_order(jobs.done) if len(slices) == 1 else _in_layer_order(jobs.done)
    return MergePlan(recipe, models, config, target, tuple(ordered), tuple(warnings))


def _open(paths: tuple[Path, ...]) -> dict[Path, Model]:
    models, problems = {}, Problems()
    for path in paths:
        try:
            model = open_model(path)
            model.check_weights()
            models[path] = model
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any("merge: models that cannot be read")
    return models


def _shape_problems(recipe: Recipe, models: Mapping[Path, Model], warnings: list[str]) -> list[str]:
    texts = []
    reference = models[recipe.reference]
    whole = all(part.layers is None for piece in recipe.slices for part in piece.parts)
    shaping = (*_SHAPING, *(["num_hidden_layers"] if whole else []))
    vocabulary = vocabulary_of(reference.tokenizer_directory)
    for path, model in models.items():
        if model is reference:
            continue
        for key in shaping:
            mine, theirs = reference.config.get(key), model.config.get(key)
            if mine != theirs and not (key in ("tie_word_embeddings", "head_dim") and not (mine and theirs)):
                texts.append(f"{key} of {path} is {theirs!r}, of {reference.path} {mine!r}")
        for key in _COMPUTING:
            mine, theirs = reference.config.get(key), model.config.get(key)
            if mine != theirs:
                warnings.append(
                    f"{key} of {path} is {theirs!r}; the result takes {mine!r} of {reference.path}"
                )
        difference = vocabulary.difference(vocabulary_of(model.tokenizer_directory))
        if difference:
            texts.append(f"the tokenizer of {path} differs from that of {reference.path}: {difference}")
        texts += _tensor_problems(reference, model, whole)
    texts += _dtype_problems(models)
    return texts


def _tensor_problems(reference: Model, model: Model, whole: bool) -> list[str]:
    """Tensors that only one has, and other shapes. Where slices may differ in depth, layer numbers are left
    out of the comparison."""

    def shapes(directory: Model) -> dict[str, tuple[int, ...]]:
        found = directory.tensors.infos
        if whole:
            return {name: info.shape for name, info in found.items()}
        return {split_layer(name)[1]: info.shape for name, info in found.items()}

    mine, theirs = shapes(reference), shapes(model)
    texts = []
    for first, second, place in ((mine, theirs, model.path), (theirs, mine, reference.path)):
        missing = [name for name in first if name not in second]
        if missing:
            texts.append(f"{place} lacks {_some(missing)}")
    other = [n for n in mine if n in theirs and mine[n] != theirs[n]]
    for name in other[:_SHOWN]:
        texts.append(f"{name}: {list(theirs[name])} in {model.path}, {list(mine[name])} in {reference.path}")
    if len(other) > _SHOWN:
        texts.append(f"... and {len(other) - _SHOWN} more tensors of other shapes")
    return texts


def _dtype_problems(models: Mapping[Path, Model]) -> list[str]:
    texts = []
    for path, model in models.items():
        wrong = [name for name, info in model.tensors.infos.items() if info.dtype not in CASTABLE]
        if wrong:
            dtype = model.tensors.infos[wrong[0]].dtype
            texts.append(
                f"{path}: {_some(wrong)} are {dtype}; only {', '.join(CASTABLE)} weights can be merged"
            )
    return texts


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _with_layers(piece: Slice, models: Mapping[Path, Model]) -> Slice:
    """Every part with its layers spelled out. Raises UserError where a range ends beyond a model."""
    problems, parts = Problems(), []
    for part in piece.parts:
        depth = models[part.model].num_layers
        layers = range(depth) if part.layers is None else part.layers
        if layers.stop > depth:
            problems.add(f"layer_range [{layers.start}, {layers.stop}] of {part.model}, which has {depth}")
        parts.append(Part(part.model, layers, part.settings))
    problems.raise_if_any("merge")
    return Slice(tuple(parts), piece.settings, piece.base)


def _outside(models: Mapping[Path, Model], reference: Path) -> list[str]:
    return [name for name in models[reference].tensors.infos if split_layer(name)[0] is None]


def _suffixes(model: Model, layer: int) -> list[str]:
    split = [split_layer(name) for name in model.tensors.infos]
    return [suffix for number, suffix in split if number == layer]


class _Jobs:
    """Collects jobs; problems of single tensors go where the others are."""

    def __init__(self, recipe: Recipe, models: Mapping[Path, Model], problems: Problems) -> None:
        self.recipe, self.models, self.problems = recipe, models, problems
        self.required = required_parameter(recipe.method)
        self.done: list[Job] = []

    def add(self, name: str, piece: Slice, source_name: Any, position: float) -> None:
        """`source_name(part)` is the name in that part's model."""
        recipe = self.recipe
        base_path = piece.base or recipe.base
        deltas = recipe.method in NEEDS_BASE
        parts = [part for part in piece.parts if not (deltas and part.model == base_path)]
        if recipe.method == "slerp":
            parts.sort(key=lambda part: part.model != base_path)
        base = None
        if deltas:
            listed = [part for part in piece.parts if part.model == base_path]
            wanted = source_name(listed[0]) if listed else source_name(_like(parts[0], base_path))
            base = self._origin(base_path, wanted)
        inputs = tuple(self._origin(part.model, source_name(part)) for part in parts)
        if any(origin is None for origin in inputs) or deltas and base is None:
            return
        shared, weights, densities = self._values(name, piece, parts, source_name, position)
        dtype = recipe.dtype or (base or inputs[0]).info.dtype
        self.done.append(Job(name, dtype, inputs[0].info.shape, inputs, base, shared, weights, densities))

    def _origin(self, path: Path, name: str) -> Origin | None:
        reader = self.models[path].tensors
        if name not in reader.infos:
            self.problems.add(f"{path} lacks {name}")
            return None
        return Origin(reader, reader.infos[name])

    def _values(
        self, name: str, piece: Slice, parts: list[Part], source_name: Any, position: float
    ) -> tuple[dict[str, float], tuple[float, ...], tuple[float, ...]]:
        """Inner scopes win: the part's own setting, then the slice's, then the recipe's."""
        scopes = (piece.settings, self.recipe.settings)
        shared = dict(DEFAULTS[self.recipe.method])
        for key in (*shared, "t"):
            value = _first(scopes, key, name, position)
            if value is not None:
                shared[key] = value
        if self.required == "t" and "t" not in shared:
            self.problems.add(f"t: no value for {name}; add a rule without filter at the end")
        weights, densities = [], []
        for part in parts:
            inner = (part.settings, *scopes)
            weight = _first(inner, "weight", source_name(part), position)
            density = _first(inner, "density", source_name(part), position)
            if weight is None and self.required == "weight":
                self.problems.add(f"weight: no value for {source_name(part)} of {part.model}")
            weights.append(1.0 if weight is None else weight)
            densities.append(shared.get("density", 1.0) if density is None else density)
        return shared, tuple(weights), tuple(densities)


def _like(part: Part, model: Path) -> Part:
    return Part(model, part.layers)


def _first(scopes: Any, key: str, name: str, position: float) -> float | None:
    for scope in scopes:
        if key in scope:
            value = scope[key].at(name, position)
            if value is not None:
                return value
    return None


def _warn_of_weights(recipe: Recipe, jobs: list[Job], warnings: list[str]) -> None:
    if recipe.method != "linear":
        return
    off = [job for job in jobs if not job.shared["normalize"] and abs(sum(job.weights) - 1) > 1e-6]
    zero = [job for job in jobs if job.shared["normalize"] and abs(sum(job.weights)) < 1e-8]
    if zero:
        raise UserError(f"weights of {zero[0].name} sum to 0 and cannot be normalized")
    if off:
        sums = sorted({round(sum(job.weights), 6) for job in off})
        shown = f"{sums[0]:g}" if len(sums) == 1 else f"{sums[0]:g} to {sums[-1]:g}"
        warnings.append(
            f"weights sum to {shown}, not 1 ({len(off)} of {len(jobs)} tensors): the result is scaled by "
            "that; --normalize divides by it"
        )


def _config(recipe: Recipe, slices: tuple[Slice, ...], models: Mapping[Path, Model]) -> dict[str, Any]:
    """The reference's config.json at the depth and dtype of the result."""
    reference = models[recipe.reference]
    targets: list[int] = []
    for piece in slices:
        own = [part for part in piece.parts if part.model == recipe.reference] or list(piece.parts)
        targets += own[0].layers
    config = grown_config(reference.config, LayerMap(reference.num_layers, tuple(targets)))
    if recipe.dtype is not None:
        for key in ("torch_dtype", "dtype"):
            if key in config or key == "dtype" and "torch_dtype" not in config:
                config[key] = DTYPES[recipe.dtype][1]
    return config


def _in_disk_order(jobs: list[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: (job.inputs[0].info.file, job.inputs[0].info.offset))


def _in_layer_order(jobs: list[Job]) -> list[Job]:
    def place(job: Job) -> tuple[int, int]:
        layer = split_layer(job.name)[0]
        return (1, layer) if layer is not None else (0, 0) if "embed" in job.name else (2, 0)

    return sorted(jobs, key=place)
