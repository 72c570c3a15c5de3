"""The shape of a decoder, read from a Hugging Face config and written back to one.

`Architecture` is what the builder, the name table and the arithmetic work with. The source's own config.json
travels along untouched (`hf_config`), so an export keeps every key that this project does not interpret.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems
from solar_mega.model.families import BEYOND, FAMILIES, Family


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and optionally a rescaling of its frequencies.

    `kind` is Hugging Face's `rope_type`; `linear` divides every frequency by `factor` (Chen et al. 2023),
    `llama3` divides only the long wavelengths and blends in between (Llama 3.1).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """head_dim / 2 angles per position, in fp64."""
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        return [self._llama3(f) for f in plain]

    def _llama3(self, frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_position / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_position / self.low_freq_factor:
            return frequency / self.factor
        turns = self.original_max_position / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class Architecture:
    """A Llama-shaped decoder. Sizes are counts of elements; `num_query_groups` is the number of key/value
    heads."""

    family: str
    """`model_type` of its family (`model.families`)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_position_embeddings: int
    rope: Rope = field(default_factory=Rope)
    sliding_window: int | None = None
    """Positions that a token sees, itself included; None sees all."""

    windowed: tuple[bool, ...] = ()
    """Which layers have the sliding window; empty where all layers are alike."""

    tied_embeddings: bool = False
    init_std: float = 0.02
    hf_config: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> "Architecture":
        """Reads a Hugging Face config (transformers 4 and 5 spellings).

        Raises UserError listing everything that is missing or that this project does not carry exactly.
        """
        problems = Problems()
        given = dict(config)
        family = _family(config, problems)
        required = (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
        )
        for key in required:
            if not isinstance(config.get(key), int) or config[key] < 1:
                problems.add(f"{key} = {config.get(key)!r}; it must be a positive integer")
        _refuse_unsupported(family, config, problems)
        rope = _rope(config, problems)
        problems.raise_if_any(where)
        config = {**family.defaults, **config}

        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if heads % groups:
            problems.add(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
        if head_dim % 2:
            problems.add(f"head_dim = {head_dim} is odd; rotary embedding rotates pairs")
        window, windowed = _windows(family, config, problems)
        problems.raise_if_any(where)
        return cls(
            family=family.model_type,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rope=rope,
            sliding_window=window,
            windowed=windowed,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            init_std=float(config.get("initializer_range", 0.02)),
            hf_config=given,
        )

    def grown(self, layer_map: LayerMap) -> "Architecture":
        """The same decoder at the depth of `layer_map`; per-layer lists of the config follow the map."""
        from solar_mega.artifact.hf import grown_config

        return replace(
            self,
            num_layers=len(layer_map),
            windowed=tuple(layer_map.remap_list(self.windowed)) if self.windowed else (),
            hf_config=grown_config(dict(self.hf_config), layer_map),
        )

    @property
    def block(self) -> Family:
        """What the layers consist of."""
        return next(family for family in FAMILIES.values() if family.model_type == self.family)

    def parameters(self) -> int:
        """Number of weights, tied embeddings counted once."""
        return self.num_layers * self.layer_parameters() + self.hidden_size + self.embedding_parameters()

    def layer_parameters(self) -> int:
        query, key_value = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        matrices = self.hidden_size * (2 * query + 2 * key_value + 3 * self.ffn_hidden_size)
        return matrices + self.layer_vectors()

    def layer_vectors(self) -> int:
        """Weights of a layer that are in no matrix product: norms and biases."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        bias = query + 2 * key_value if self.block.qkv_bias else 0
        return 2 * self.hidden_size + bias + (2 * self.head_dim if self.block.qk_norm else 0)

    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations to train on one token: forward and backward, recomputation not counted.

        Six per weight of every matrix product (2 forward, 4 backward), the head included and the embedding
        look-up not, plus attention scores and values: 12 * layers * heads * head_dim * seq_length, halved
        because a causal token sees half the sequence on average (PaLM, arXiv 2204.02311, appendix B, with
        causality).
        """
        in_layers = self.num_layers * (self.layer_parameters() - self.layer_vectors())
        matrices = in_layers + self.vocab_size * self.hidden_size
        attention = 12 * self.num_layers * self.num_attention_heads * self.head_dim * seq_length / 2
        return 6 * matrices + attention


def _family(config: Mapping[str, Any], problems: Problems) -> Family:
    names = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.architecture in names or not names and config.get("model_type") == family.model_type:
            return family
    missing = sorted({part for key, part in BEYOND.items() if config.get(key) not in (None, False, 0)})
    lacks = f"; it has {', '.join(missing)}, which the block here does not" if missing else ""
    problems.add(
        f"architectures = {names!r} is not supported{lacks}; supported: {', '.join(FAMILIES)} (a family "
        "with the parts of one of these is a few lines in model/families.py)"
    )
    return FAMILIES["LlamaForCausalLM"]


def _refuse_unsupported(family: Family, config: Mapping[str, Any], problems: Problems) -> None:
    """Options of the families that would change the function and that the Megatron block here does not
    carry."""
    allowed = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "attention_dropout": (0, 0.0, None),
        "resid_pdrop": (0, 0.0, None),
        "quantization_config": (None,),
    }
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            problems.add(f"{key} = {config[key]!r} is not supported; it must be {values[0]!r}")


def _windows(
    family: Family, config: Mapping[str, Any], problems: Problems
) -> tuple[int | None, tuple[bool, ...]]:
    """(`sliding_window`, which layers have it; empty where all are alike)."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if family.windows == "none" or window is None:
        return None, ()
    kinds = config.get("layer_types")
    if family.windows == "all":
        if kinds and set(kinds) != {"sliding_attention"}:
            problems.add(
                f"layer_types beside sliding_window = {window} is not something {family.architecture} has"
            )
        return window, ()
    if not config.get("use_sliding_window"):
        return None, ()
    if kinds is None:
        first = config["max_window_layers"]
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        problems.add(
            f"layer_types has {len(kinds)} entries ({', '.join(sorted(set(kinds)))}); it needs {layers}, "
            "each sliding_attention or full_attention"
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(windowed):
        return None, ()
    return window, () if all(windowed) else windowed


def _rope(config: Mapping[str, Any], problems: Problems) -> Rope:
    """transformers 5 keeps everything in `rope_parameters`; 4 has `rope_theta` and `rope_scaling` side by
    side."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "linear", "llama3"):
        problems.add(f"rope_type = {kind!r} is not supported; supported: default, linear, llama3")
        return Rope()
    if partial not in (1, 1.0, None):
        problems.add(f"partial_rotary_factor = {partial!r} is not supported; it must be 1.0")
    needed = {"default": (), "linear": ("factor",)}.get(
        kind, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    missing = [key for key in needed if key not in scaling]
    if missing:
        problems.add(f"rope_type = {kind!r} needs {', '.join(missing)} beside it")
        return Rope()
    return Rope(
        theta=float(theta),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings", 8192)),
    )
