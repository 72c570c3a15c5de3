"""Self-attention: packed projection, split and rotary in one op, core attention, output projection.

Shapes:  s sequence, b batch, h hidden, n query heads per rank, g key/value heads per rank, d head_dim.

     [s, b, h] ─ linear_qkv ─ [s, b, g, (n/g + 2)·d] ─ qkv_rotary
                   ┌─ q [s, b, n, d] ─┐
        qkv_rotary ├─ k [s, b, g, d] ─┤ core attention ─ [s, b, n·d] ─ linear_proj ─ [s, b, h]
                   └─ v [s, b, g, d] ─┘
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from solar_mega.model.architecture import Rope
from solar_mega.model.packing import Packing
from solar_mega.model.rotary import rotary_tables
from solar_mega.ops import causal_attention, qkv_rotary
from solar_mega.ops.causal_attention import band


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, its parameters and their names, with split and rotary fused.

    The key/value heads must be a multiple of the tensor-parallel size (`model.layout` checks).
    """

    def __init__(
        self,
        config,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        rope: Rope,
        max_positions: int,
        implementation: str = "fused",
        **options,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, **options)
        device = torch.device(torch.cuda.current_device())
        self.tables = rotary_tables(rope, config.kv_channels, max_positions, device)
        self.implementation = implementation

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params=None,
        **_,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h]; rotary_pos_emb: positions [s] or [s, b] int64, None for 0 … s − 1.

        Returns (output [s, b, h], bias or None), as Megatron's.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        groups = self.num_query_groups_per_partition
        mixed = mixed.view(*mixed.shape[:2], groups, -1)
        if self.q_layernorm is not None:
            mixed = self._normed(mixed)
        query, key, value = qkv_rotary(
            mixed,
            *self.tables,
            self.num_attention_heads_per_partition // groups,
            positions=rotary_pos_emb,
            implementation=self.implementation,
        )
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            context = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed_seq_params,
            )
        return self.linear_proj(context)

    def _normed(self, mixed: Tensor) -> Tensor:
        """[s, b, g, (n/g + 2)·d] with the norms of queries and keys applied, each over one head."""
        d = self.hidden_size_per_attention_head
        heads = mixed.view(*mixed.shape[:3], -1, d)
        query, key, value = heads.split([heads.shape[3] - 2, 1, 1], dim=3)
        return torch.cat([self.q_layernorm(query), self.k_layernorm(key), value], dim=3).flatten(3)


def window_of(config, layer_number: int) -> int | None:
    """Positions that a token of the layer (counted from 1) sees, itself included; None sees all."""
    has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] + 1 if has_window else None


class SDPAttention(nn.Module):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`.

    Grouped key/value heads stay grouped; a sliding window narrower than the sequence becomes an explicit
    mask. Packed samples are attended to one after the other, without a mask that none of its kernels for
    long sequences takes.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type: AttnMaskType, softmax_scale=None, **_
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.dropout = config.attention_dropout
        self.window = window_of(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **_,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n*d]; b = 1 for packed samples."""
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        samples = packed_seq_params.samples(query)
        return torch.cat([self._attend(query[at], key[at], value[at]) for at in samples]).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s = query.shape[0]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d], views
        window = self.window if self.window is not None and self.window < s else None
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if window is None else band(s, window, q.device),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=window is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return context.permute(2, 0, 1, 3)


class FusedAttention(SDPAttention):
    """Causal attention through this project's op on CPUs, where it takes about half the time; elsewhere as
    above.
    """

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
        if query.device.type != "cpu" or (self.training and self.dropout > 0):
            return super().forward(query, key, value, None, packed_seq_params)
        cu_seqlens = None
        if packed_seq_params is not None:
            packed_seq_params.check(query)
            cu_seqlens = packed_seq_params.cu_seqlens_q
        context = causal_attention(
            query, key, value, scale=self.scale, window=self.window or 0, cu_seqlens=cu_seqlens
        )
        return context.flatten(2)


class UnfusedAttention(DotProductAttention):
    """Megatron's own, all scores at once, with packed samples as a mask."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """As `SDPAttention.forward`."""
        if packed_seq_params is not None:
            packed_seq_params.check(query)
            window = window_of(self.config, self.layer_number) or 0
            seen = band(query.shape[0], window, query.device, packed_seq_params.cu_seqlens_q)
            attention_mask = ~seen[None, None]
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
