"""What a merge is told, from whichever spelling: the method, and which layers of which models make which
layers of the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from solar_mega.errors import Problems
from solar_mega.merge.settings import Setting, Settings, read_filters

Method = Literal["linear", "slerp", "delta_slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
METHODS: tuple[str, ...] = get_args(Method)

DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "linear": {"normalize": 0},
    "slerp": {},
    "delta_slerp": {},
    "task_arithmetic": {"normalize": 0, "lambda": 1},
    "ties": {"normalize": 1, "lambda": 1, "density": 1},
    "dare_linear": {"normalize": 0, "lambda": 1, "density": 1, "rescale": 1},
    "dare_ties": {"normalize": 0, "lambda": 1, "density": 1, "rescale": 1},
}
"""Parameters of each method beside `weight` (slerp and delta_slerp: `t`), which must be given."""

NEEDS_BASE = ("delta_slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
PAIRS = ("slerp", "delta_slerp")


def required_parameter(method: str) -> str:
    return "t" if method in PAIRS else "weight"


@dataclass(frozen=True)
class Part:
    """One model's contribution to a slice."""

    model: Path
    layers: range | None = None
    """Its layers, in order; None: all of them."""

    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result. All parts have the same number of layers."""

    parts: tuple[Part, ...]
    settings: Settings = field(default_factory=dict)
    base: Path | None = None
    """Overrides the recipe's."""


@dataclass(frozen=True)
class Recipe:
    """A merge. The result has the slices' layers one after the other; what is outside the layers comes from
    the first slice (embeddings) and the last one (final norm, head)."""

    method: str
    slices: tuple[Slice, ...]
    base: Path | None = None
    """slerp: the model at t = 0. Others: the common ancestor that deltas are taken from."""

    settings: Settings = field(default_factory=dict)
    seed: int = 0
    """Of DARE's random choices."""

    dtype: str | None = None
    """safetensors dtype of the result; None: that of the base, or of the first model."""

    written: Mapping[str, Any] = field(default_factory=dict)
    """As it was given, for lineage.json."""

    @property
    def reference(self) -> Path:
        """The model that gives config.json, tokenizer and dtype."""
        return self.base or self.slices[0].parts[0].model

    @property
    def models(self) -> tuple[Path, ...]:
        """Every model once, the reference first."""
        paths = [self.reference]
        for piece in self.slices:
            paths += [part.model for part in piece.parts] + ([piece.base] if piece.base else [])
        return tuple(dict.fromkeys(paths))


@dataclass(frozen=True)
class MergeConfig:
    """What `solar-mega merge` reads from its flags or from our TOML, where these are the top-level keys."""

    out: Path
    """Directory to write; must not exist, or be empty."""

    method: Method
    """linear: weighted sum (the average, with equal weights). slerp: along the arc between two models.
    delta_slerp: the same between their differences from a common base. task_arithmetic, ties, dare_linear,
    dare_ties: weighted differences from a base, added to it, after thinning them out."""

    models: tuple[Path, ...]
    """Hugging Face directories to merge; two for slerp and delta_slerp."""

    base: Path | None = None
    """Common ancestor of the models (all methods but linear and slerp)."""

    weights: tuple[float, ...] = ()
    """One per model. Default for linear: equal ones that sum to 1; for the methods with a base: 1 each."""

    normalize: bool | None = None
    """Divide by the sum of the weights. Default: only for ties, as in its paper."""

    t: tuple[float, ...] = (0.5,)
    """slerp, delta_slerp: 0 is the first model, 1 the second. Several values are a gradient from the first
    layer to the last; embeddings and head take the first value."""

    t_filters: tuple[str, ...] = ()
    """slerp, delta_slerp: other t for tensors with a part of their name, such as `self_attn=0,0.5,1`
    `mlp=0.3`; the first that fits decides, and `t` where none does."""

    density: float = 1.0
    """ties, dare_*: share of each difference that is kept."""

    scale: float = 1.0
    """Methods with a base: factor on the merged difference (lambda in TIES)."""

    seed: int = 0
    """dare_*: seeds what is dropped; the result does not depend on threads, shards or their order."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """dtype of the result; default: that of the base, or of the first model."""

    shard_size: str = "5GB"
    """Largest safetensors file."""

    threads: int | None = None
    """CPU threads; default: all cores."""


def recipe_of(config: MergeConfig) -> Recipe:
    """The recipe that flags or TOML describe. Raises UserError listing everything that does not fit."""
    from solar_mega.artifact.cast import weight_dtype

    problems = Problems()
    weights = _weights(config, problems)
    settings = {}
    if config.method in PAIRS:
        settings["t"] = Setting(
            (*read_filters(config.t_filters, "t_filters"), *Setting.constant(*config.t).rules)
        )
    elif config.t_filters or config.t != (0.5,):
        problems.add(f"t and t_filters are for slerp and delta_slerp, not for {config.method}")
    for name, value in (("density", config.density), ("lambda", config.scale)):
        if name in DEFAULTS[config.method]:
            settings[name] = Setting.constant(value)
        elif value != 1.0:
            key = "scale" if name == "lambda" else name
            problems.add(f"{key} = {value} means nothing to {config.method}")
    if config.normalize is not None:
        if "normalize" in DEFAULTS[config.method]:
            settings["normalize"] = Setting.constant(float(config.normalize))
        else:
            problems.add(f"normalize means nothing to {config.method}, which has no weights")
    parts = tuple(
        Part(model, settings={} if weight is None else {"weight": Setting.constant(weight)})
        for model, weight in zip(config.models, weights, strict=True)
    )
    recipe = Recipe(
        config.method,
        (Slice(parts),),
        config.models[0] if config.method == "slerp" and config.models else config.base,
        settings,
        config.seed,
        weight_dtype(config.dtype) if config.dtype else None,
        _as_json(config),
    )
    if config.method == "slerp" and config.base is not None:
        problems.add("base is not used by slerp; delta_slerp takes the arc between differences from a base")
    elif config.method == "linear" and config.base is not None:
        problems.add("base is not used by linear; task_arithmetic adds weighted differences to a base")
    check_recipe(recipe, problems)
    problems.raise_if_any("merge")
    return recipe


def _weights(config: MergeConfig, problems: Problems) -> tuple[float | None, ...]:
    count = len(config.models)
    if config.method in PAIRS:
        if config.weights:
            problems.add(f"weights are not used by {config.method}; t says how far to go")
        return (None,) * count
    if not config.weights:
        return (1 / count if config.method == "linear" else 1.0,) * count
    if len(config.weights) != count:
        problems.add(f"weights: {len(config.weights)} given for {count} models; give one for each")
        return (1.0,) * count
    return config.weights


def _as_json(config: MergeConfig) -> dict[str, Any]:
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    skipped = ("out", "threads")  # where and how fast, not what
    return {key: plain(value) for key, value in asdict(config).items() if key not in skipped}


def check_recipe(recipe: Recipe, problems: Problems) -> None:
    """What can be wrong with a recipe before any model is opened."""
    if recipe.method not in METHODS:
        problems.add(f'method "{recipe.method}" is unknown; allowed: {", ".join(METHODS)}')
        return
    for number, piece in enumerate(recipe.slices):
        where = f"slice {number}: " if len(recipe.slices) > 1 else ""
        base = piece.base or recipe.base
        models = [part.model for part in piece.parts]
        merged = [model for model in models if model != base or recipe.method not in NEEDS_BASE]
        if recipe.method in NEEDS_BASE and base is None:
            problems.add(f"{where}{recipe.method} needs base, the model that the others were trained from")
        if recipe.method in PAIRS and len(merged) != 2:
            problems.add(f"{where}{recipe.method} merges two models, got {len(merged)}")
        if recipe.method == "slerp" and base not in models:
            problems.add(f"{where}base_model must be one of the two models of slerp: it is the one at t = 0")
        if not merged:
            problems.add(f"{where}models: none to merge; give Hugging Face directories")
        if len(set(models)) < len(models) and any(part.layers is None for part in piece.parts):
            problems.add(f"{where}the same model is listed twice: {max(models, key=models.count)}")
        lengths = {len(part.layers) for part in piece.parts if part.layers is not None}
        if len(lengths) > 1:
            problems.add(
                f"{where}layer_range must have the same length for all models, got {sorted(lengths)}"
            )
        _check_values(recipe, piece, where, problems)


def _check_values(recipe: Recipe, piece: Slice, where: str, problems: Problems) -> None:
    limits = {"density": (0.0, 1.0), "t": (0.0, 1.0)}
    scopes = [recipe.settings, piece.settings, *(part.settings for part in piece.parts)]
    for name, (low, high) in limits.items():
        values = [v for scope in scopes if name in scope for rule in scope[name].rules for v in rule.values]
        outside = [value for value in values if not low <= value <= high]
        if outside:
            problems.add(f"{where}{name} = {outside[0]:g} is outside {low:g} to {high:g}")
