"""Core attention through optional libraries for GPUs: flash-attn and Transformer Engine.

Each takes [s, b, heads, d], and hands packed samples on in the libraries' layout [tokens, heads, d]. That
they are there is checked before a model is built (`runtime.accelerators`).
"""

from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from solar_mega.model.attention import SDPAttention
from solar_mega.model.packing import Packing


class FlashAttention(SDPAttention):
    """flash-attn: `flash_attn_func`, and `flash_attn_varlen_func` for packed samples. bf16 only
    (`config.check`)."""

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, **options) -> None:
        super().__init__(config, layer_number, attn_mask_type, **options)
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        self.whole, self.packed = flash_attn_func, flash_attn_varlen_func
        # flash-attn counts the positions before the own one, and has -1 for all of them.
        window = (-1, -1) if self.window is None else (self.window - 1, 0)
        self.options = {"softmax_scale": self.scale, "causal": True, "window_size": window}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **_,
    ) -> Tensor:
        """As `SDPAttention.forward`."""
        options = {**self.options, "dropout_p": self.dropout if self.training else 0.0}
        if packed_seq_params is None:
            context = self.whole(*(t.transpose(0, 1) for t in (query, key, value)), **options)
            return context.transpose(0, 1).flatten(2)
        p = packed_seq_params
        p.check(query)
        context = self.packed(
            *(t.squeeze(1) for t in (query, key, value)),
            cu_seqlens_q=p.cu_seqlens_q,
            cu_seqlens_k=p.cu_seqlens_kv,
            max_seqlen_q=p.max_seqlen_q,
            max_seqlen_k=p.max_seqlen_kv,
            **options,
        )
        return context.flatten(1).unsqueeze(1)


class TransformerEngineAttention(nn.Module):
    """Transformer Engine's attention through Megatron's wrapper of it."""

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, **options) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.mask_type = attn_mask_type
        self.inner = TEDotProductAttention(config, layer_number, attn_mask_type, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **_,
    ) -> Tensor:
        """As `SDPAttention.forward`."""
        if packed_seq_params is None:
            return self.inner(query, key, value, attention_mask, self.mask_type)
        packed_seq_params.check(query)
        context = self.inner(
            *(t.squeeze(1) for t in (query, key, value)),
            None,
            AttnMaskType.padding_causal,  # the only causal one that the packed layout has
            packed_seq_params=packed_seq_params,
        )
        return context.reshape(query.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """Nothing: no weights, and Transformer Engine's own state is that of FP8, so that checkpoints are the
        same under any attention."""
        return {}
