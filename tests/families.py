"""Tiny models of every supported family as Hugging Face directories, made by transformers itself."""

from pathlib import Path

import torch

SEQUENCE = 24

_SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    initializer_range=0.15,  # large enough that a wrong rotation or mask moves the logits far beyond 1e-4
)

FAMILIES = {
    "llama_mha": ("Llama", dict(num_key_value_heads=4)),
    "llama3": (
        "Llama",
        dict(
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=100.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    "llama_linear": (
        "Llama",
        dict(num_key_value_heads=2, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    ),
    "mistral_window": ("Mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "qwen2": (
        "Qwen2",
        dict(num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=False),
    ),
    "qwen2_windows": (
        "Qwen2",
        dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "phi3": ("Phi3", dict(num_key_value_heads=2, sliding_window=9, pad_token_id=None)),
    "mistral_head_dim": ("Mistral", dict(num_key_value_heads=2, head_dim=16, sliding_window=None)),
}


def make_family(name: str, directory: Path, layers: int = 4, shard_size: str = "40KB") -> Path:
    """Writes the model with random weights (norms included) and returns its directory."""
    import transformers

    kind, options = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SMALL, "num_hidden_layers": layers, **options})
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    target = directory / name
    model.save_pretrained(target, max_shard_size=shard_size)
    return target


def tokens(vocabulary: int = 96, rows: int = 2) -> torch.Tensor:
    """[rows, SEQUENCE] token ids, always the same."""
    return torch.randint(0, vocabulary, (rows, SEQUENCE), generator=torch.Generator().manual_seed(3))


def transformers_logits(directory: Path) -> torch.Tensor:
    """fp32 logits [rows, SEQUENCE, vocabulary] of `tokens()`, by transformers' eager attention."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(tokens()).logits
