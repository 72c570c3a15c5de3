"""The modules that replace Megatron's inside its own block: norm, core attention, layer.

Shapes:  s sequence, b batch, h hidden (per rank s/tp with sequence parallelism), n query heads per rank,
         g key/value heads per rank, d head_dim.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from solar_mega.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019), fp32 statistics.

    Serves sequence parallelism, which Megatron's torch norm refuses: the weight is marked so that its
    gradient is summed over the tensor-parallel ranks, each of which sees only its part of the sequence.
    """

    def __init__(
        self, config, hidden_size: int, eps: float = 1e-5, implementation: str = "fused", **_
    ) -> None:
        super().__init__()
        self.eps = eps
        self.implementation = implementation
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps, implementation=self.implementation)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass over memory."""
        return add_rms_norm(x, residual, self.weight, self.eps, implementation=self.implementation)


class SDPAttention(nn.Module):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`.

    Grouped key/value heads stay grouped; a sliding window narrower than the sequence becomes an explicit
    mask.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type: AttnMaskType, softmax_scale=None, **_
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.dropout = config.attention_dropout
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n*d]. Raises ValueError for packed
        sequences."""
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError("SDPAttention takes unpacked [s, b, heads, d] sequences; got packed_seq_params")
        s, b = query.shape[:2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d], views
        window = self.window if self.window is not None and self.window < s else None
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if window is None else _band(s, window, q.device),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=window is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)


def _band(s: int, window: int, device: torch.device) -> Tensor:
    """[s, s], True where key j is visible to query i: i - window < j <= i."""
    distance = torch.arange(s, device=device)[:, None] - torch.arange(s, device=device)[None, :]
    return (distance >= 0) & (distance < window)


class SolarLayer(TransformerLayer):
    """Megatron's layer with the residual add fused into the norm before the MLP.

        x ─ norm ─ attention ─┐
        └───────────────── add+norm ─ MLP ─ add ─ x'
                                └───────────┘

    The last add stays apart: its norm belongs to the next layer, and Megatron's block hands layers one
    tensor.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """hidden_states [s, b, h] -> (the same, None)."""
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            rotary_pos_emb=kwargs.get("rotary_pos_emb"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        normed, residual = self.pre_mlp_layernorm.add(attended, hidden_states)
        transformed, _ = self.mlp(normed)
        return residual + transformed, None
