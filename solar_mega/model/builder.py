"""Architecture + layout -> megatron-core GPT model chunks, one per virtual stage of this rank."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from solar_mega.config.schema import KernelConfig, ParallelConfig, Precision, TrainConfig
from solar_mega.model.architecture import Architecture
from solar_mega.model.head import LossHead, SolarGPT
from solar_mega.model.layout import check_layout
from solar_mega.model.linear import ColumnLinear, RowLinear
from solar_mega.model.rotary import RotaryPositions
from solar_mega.model.spec import SolarSpecProvider, solar_layer_spec
from solar_mega.runtime.accelerators import check_accelerators

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

_FP8 = {
    "off": {},
    # Gradients need range more than precision where a whole tensor has one scale.
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}


def build_model(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: Precision,
    kernels: KernelConfig | None = None,
    recompute: str = "none",
    max_sequence_length: int | None = None,
) -> list[GPTModel]:
    """This rank's part of the decoder. Process groups must exist (`runtime.parallel.start`).

    The weights are allocated and not initialised: `checkpoint.from_hf` or `checkpoint.megatron` fills every
    one.

    Returns:
        One chunk per virtual stage, in pipeline order. `chunk(tokens, position_ids, None)` gives logits
        [b, s, vocab / tp] on the last stage and hidden states elsewhere; with `labels=` per-token losses [b,
        s].

    Raises:
        UserError: the decoder does not fit the layout; all reasons listed.
    """
    check_layout(arch, parallel, max_sequence_length).raise_if_any(
        "the model does not fit the parallel layout"
    )
    kernels = kernels or KernelConfig()
    check_accelerators(parallel, kernels)
    config = transformer_config(arch, parallel, precision, recompute, kernels)
    stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
    return [_build_chunk(arch, config, kernels, max_sequence_length, stage) for stage in stages]


def build_for_training(
    arch: Architecture, parallel: ParallelConfig, train: TrainConfig, kernels: KernelConfig
):
    if parallel.tp_comm_overlap:
        check_accelerators(parallel, kernels)
        from solar_mega.model.transformer_engine import allocate_user_buffers

        allocate_user_buffers(train.seq_length * train.micro_batch_size, arch.hidden_size, parallel, kernels)
    return build_model(arch, parallel, train.precision, kernels, train.recompute, train.seq_length)


def transformer_config(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: str,
    kernels: KernelConfig | None = None,
) -> TransformerConfig:
    kernels = kernels or KernelConfig()
    dtype = DTYPES[precision]
    window = (arch.sliding_window - 1, 0) if arch.sliding_window else None
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.block.qkv_bias,
        qk_layernorm=arch.block.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        window_size=window,
        window_attn_skip_freq=[int(has_window) for has_window in arch.windowed] or None,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        # With two stages a rank's next and previous neighbour are the same process, and batched sends of the
        # interleaved schedule pair up activations with gradients. Unbatched ones use a group per direction.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Weights come from a checkpoint or from `checkpoint.random_weights`, never from Megatron's
        # initialisers.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        # Transformer Engine's linears add by themselves, see `model.spec`; Megatron's take apex.
        gradient_accumulation_fusion=kernels.gradient_accumulation_fusion and kernels.linear == "local",
        tp_comm_overlap=parallel.tp_comm_overlap,
        # Each of these needs apex, Transformer Engine or a compiler at run time.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **_RECOMPUTE[recompute],
        **_FP8[kernels.fp8],
    )


def _build_chunk(
    arch: Architecture,
    config: TransformerConfig,
    kernels: KernelConfig,
    max_sequence_length: int | None,
    vp_stage: int | None,
) -> GPTModel:
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    positions = max_sequence_length or arch.max_position_embeddings
    block = TransformerBlockSubmodules(
        layer_specs=[solar_layer_spec(arch, kernels, positions)] * layers,
        layer_norm=SolarSpecProvider(kernels).layer_norm(),
    )
    chunk = SolarGPT(
        config,
        block,
        kernels=kernels,
        vocab_size=arch.vocab_size,
        max_sequence_length=positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope.theta,
        vp_stage=vp_stage,
    )
    chunk.rotary_pos_emb = RotaryPositions(chunk)
    chunk.arch = arch
    _mark_tensor_parallel_weights(chunk)
    if not torch.cuda.is_available():
        return chunk
    return chunk.cuda()


def _mark_tensor_parallel_weights(chunk: GPTModel) -> None:
    """Megatron marks split weights while it initialises them, which is skipped here. Without the marks they
    would count once instead of once per rank in the gradient norm."""
    split_axis = {
        ColumnLinear: 0,
        LossHead: 0,
        RowLinear: 1,
        tensor_parallel.VocabParallelEmbedding: 0,
    }
    for module in chunk.modules():
        axis = split_axis.get(type(module))  # Transformer Engine's linears mark theirs themselves
        if axis is None:
            continue
        split = [module.weight, module.bias if axis == 0 and hasattr(module, "bias") else None]
        for weight in split:
            if weight is not None and not getattr(weight, "tensor_model_parallel", False):
                tensor_parallel.set_tensor_model_parallel_attributes(
                    weight, is_parallel=True, dim=axis, stride=1
                )
