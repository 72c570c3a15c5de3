"""The supported model families: what each one's layer consists of, under which names, and what its config
leaves unsaid. This file is all there is to a family whose parts Megatron's block already has.

A layer is a table from Megatron's parameter to the Hugging Face tensors it is packed from (how: the first
word, one of `checkpoint.names.PACKINGS`). For a new family, copy the entry of the nearest one, spell out what
differs, and add a tiny model of it to `tests/families.py`, which compares logits with transformers:

    MY_LAYER = LLAMA_LAYER | {
        "self_attention.linear_qkv.bias": ("qkv_bias", "self_attn.q_proj.bias", ...),
    }
    Family("MyForCausalLM", "my", MY_LAYER, windows="none", defaults={"rms_norm_eps": 1e-5})
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layer = Mapping[str, tuple[str, ...]]

LLAMA_LAYER: Layer = {
    "input_layernorm.weight": ("replicated", "input_layernorm.weight"),
    "self_attention.linear_qkv.weight": (
        "qkv",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("attention_columns", "self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": ("replicated", "post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": ("gated", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("ffn_columns", "mlp.down_proj.weight"),
}

QWEN2_LAYER: Layer = {
    **LLAMA_LAYER,
    "self_attention.linear_qkv.bias": (
        "qkv_bias",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
}

QWEN3_LAYER: Layer = {
    **LLAMA_LAYER,
    "self_attention.q_layernorm.weight": ("head_norm", "self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": ("head_norm", "self_attn.k_norm.weight"),
}

PHI3_LAYER: Layer = {
    **LLAMA_LAYER,
    "self_attention.linear_qkv.weight": ("fused_qkv", "self_attn.qkv_proj.weight"),
    "mlp.linear_fc1.weight": ("fused_gated", "mlp.gate_up_proj.weight"),
}


@dataclass(frozen=True)
class Family:
    """One transformers class."""

    architecture: str
    """The class, as config.json's `architectures` names it."""

    model_type: str

    layer: Layer
    """Megatron's parameter inside a layer -> packing and Hugging Face tensors, in transformers' order."""

    windows: Literal["none", "all", "layers"] = "none"
    """Who attends within `sliding_window`: nobody, every layer, or those that `layer_types` names while
    `use_sliding_window` is on."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json lacks, where that is not what Llama assumes."""

    @property
    def qkv_bias(self) -> bool:
        return "self_attention.linear_qkv.bias" in self.layer

    @property
    def qk_norm(self) -> bool:
        return "self_attention.q_layernorm.weight" in self.layer


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", LLAMA_LAYER),  # Llama 1, 2, 3.x; SOLAR is Llama with 48 layers
        Family(
            "MistralForCausalLM",
            "mistral",
            LLAMA_LAYER,
            windows="all",
            defaults={
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                "max_position_embeddings": 131072,
            },
        ),
        Family(
            "Qwen2ForCausalLM",  # Qwen 2 and 2.5
            "qwen2",
            QWEN2_LAYER,
            windows="layers",
            defaults={
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_position_embeddings": 32768,
                "max_window_layers": 28,
            },
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            QWEN3_LAYER,
            windows="layers",
            defaults={
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_position_embeddings": 32768,
                "max_window_layers": 28,
            },
        ),
        Family(
            "Phi3ForCausalLM",  # Phi-3 and Phi-3.5 with plain rotary embedding; long-context ones are refused
            "phi3",
            PHI3_LAYER,
            windows="all",
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        ),
    )
}

BEYOND: Mapping[str, str] = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "query_pre_attn_scalar": "attention scores scaled by a setting of their own",
    "attention_multiplier": "attention scores scaled by a setting of their own",
    "residual_multiplier": "scaled residual branches",
    "embedding_multiplier": "scaled embeddings",
    "logits_scaling": "scaled logits",
    "logit_scale": "scaled logits",
    "clip_qkv": "clipped queries, keys and values",
    "parallel_attn": "attention and feed-forward in parallel",
    "use_parallel_residual": "attention and feed-forward in parallel",
    "use_qk_norm": "norms of queries and keys",
    "layer_norm_eps": "LayerNorm",
    "layer_norm_epsilon": "LayerNorm",
    "norm_epsilon": "LayerNorm",
    "alibi": "ALiBi positions",
    "no_rope_layers": "layers without positions",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
}
"""Keys of config.json that give away parts which the block here does not have."""
