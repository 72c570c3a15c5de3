"""The modules that replace Megatron's inside its own block: norm, feed-forward and layer; attention.py has
attention.

Shapes:  s sequence, b batch, h hidden (per rank s/tp with sequence parallelism).
"""

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from solar_mega.ops import add_rms_norm, rms_norm, swiglu


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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x: [..., hidden_size] -> norm(x); with `residual`, (norm(x + residual), x + residual) in one pass
        over memory.

        Both are calls of the module: weights that are still being gathered are waited for in a hook before
        it.
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps, implementation=self.implementation)
        return add_rms_norm(x, residual, self.weight, self.eps, implementation=self.implementation)


class GatedMLP(MLP):
    """Megatron's gated feed-forward, its parameters and their names, with the activation in one op."""

    def __init__(self, config, submodules, *args, implementation: str = "fused", **options) -> None:
        super().__init__(config, submodules, *args, **options)
        self.implementation = implementation

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> (the same, bias or None)."""
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_and_up, implementation=self.implementation))


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
        normed, residual = self.pre_mlp_layernorm(attended, hidden_states)
        transformed, _ = self.mlp(normed)
        return residual + transformed, None
