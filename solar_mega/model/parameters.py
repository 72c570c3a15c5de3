"""Which weights a rank holds, counted without building anything.

    first chunk     embedding [V/t, h]
    every layer     linear_qkv [(n + 2 g) d / t, h]   linear_proj [h, n d / t]    (bias, two norms [d])
                    linear_fc1 [2 f / t, h]           linear_fc2 [h, f / t]       two norms [h]
    last chunk      final norm [h], output layer [V/t, h]

Tied embeddings are one tensor on one stage, and a copy on the first and on the last stage of a pipeline.
"""

from dataclasses import dataclass

from solar_mega.config.schema import ParallelConfig
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import layers_of_chunk


@dataclass(frozen=True)
class Weight:
    """One parameter of a rank."""

    name: str
    """As Megatron spells it, with the layer's global number."""

    elements: int
    """Of this rank's part."""

    shared: bool = False
    """A tied embedding that the first and the last stage both hold; Megatron gives it a gradient bucket of
    its own."""


def chunk_weights(arch: Architecture, parallel: ParallelConfig, pp_rank: int, chunk: int) -> list[Weight]:
    """The weights of one model chunk on any tensor-parallel rank, in the order of the model's parameters.

    Args:
        pp_rank: pipeline stage, from 0.
        chunk: virtual stage on it, from 0.
    """
    tp, pp, vpp = parallel.tp, parallel.pp, parallel.vpp
    first, last = (pp_rank, chunk) == (0, 0), (pp_rank, chunk) == (pp - 1, vpp - 1)
    embedding = arch.vocab_size // tp * arch.hidden_size
    copied = arch.tied_embeddings and pp > 1
    weights: list[Weight] = []
    if first:
        weights.append(Weight("embedding.word_embeddings.weight", embedding, copied))
    for layer in layers_of_chunk(arch.num_layers, parallel, pp_rank, chunk):
        weights += _layer_weights(arch, tp, f"decoder.layers.{layer}")
    if last:
        weights.append(Weight("decoder.final_layernorm.weight", arch.hidden_size))
        if not arch.tied_embeddings or copied:
            weights.append(Weight("output_layer.weight", embedding, copied))
    return weights


def _layer_weights(arch: Architecture, tp: int, prefix: str) -> list[Weight]:
    h, f = arch.hidden_size, arch.ffn_hidden_size
    query, groups = arch.num_attention_heads * arch.head_dim, 2 * arch.num_query_groups * arch.head_dim
    block, norms = arch.block, ("q_layernorm", "k_layernorm")
    bias = [Weight(f"{prefix}.self_attention.linear_qkv.bias", (query + groups) // tp)]
    head_norms = [Weight(f"{prefix}.self_attention.{name}.weight", arch.head_dim) for name in norms]
    return [
        Weight(f"{prefix}.input_layernorm.weight", h),
        Weight(f"{prefix}.self_attention.linear_proj.weight", query // tp * h),
        Weight(f"{prefix}.self_attention.linear_qkv.weight", (query + groups) // tp * h),
        *(bias if block.qkv_bias else []),
        *(head_norms if block.qk_norm else []),
        Weight(f"{prefix}.pre_mlp_layernorm.weight", h),
        Weight(f"{prefix}.mlp.linear_fc1.weight", 2 * f // tp * h),
        Weight(f"{prefix}.mlp.linear_fc2.weight", f // tp * h),
    ]


def stage_weights(arch: Architecture, parallel: ParallelConfig, pp_rank: int) -> list[list[Weight]]:
    """`chunk_weights` of every chunk of a pipeline stage."""
    return [chunk_weights(arch, parallel, pp_rank, chunk) for chunk in range(parallel.vpp)]
