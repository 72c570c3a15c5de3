"""Which module goes where in megatron-core's block, through its own extension point."""

from types import SimpleNamespace

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from solar_mega.config.schema import KernelConfig
from solar_mega.model.accelerated_attention import FlashAttention, TransformerEngineAttention
from solar_mega.model.architecture import Architecture
from solar_mega.model.attention import FusedAttention, RotarySelfAttention, SDPAttention, UnfusedAttention
from solar_mega.model.linear import ColumnLinear, RowLinear
from solar_mega.model.modules import GatedMLP, RMSNorm, SolarLayer


class SolarSpecProvider(LocalSpecProvider):
    """megatron-core's local modules with this project's linears, norm and attention."""

    def __init__(self, kernels: KernelConfig) -> None:
        self.kernels = kernels

    def column_parallel_linear(self) -> type | ModuleSpec:
        return ColumnLinear if self.kernels.linear == "local" else self._transformer_engine("ColumnLinear")

    def row_parallel_linear(self) -> type | ModuleSpec:
        return RowLinear if self.kernels.linear == "local" else self._transformer_engine("RowLinear")

    def _transformer_engine(self, name: str) -> ModuleSpec:
        from solar_mega.model import transformer_engine  # needs the library

        return ModuleSpec(
            module=getattr(transformer_engine, name),
            params={"fuse_weight_gradient": self.kernels.gradient_accumulation_fusion},
        )

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> ModuleSpec:
        return ModuleSpec(module=RMSNorm, params={"implementation": self.kernels.rms_norm})

    def core_attention(self) -> type:
        kinds = {
            "fused": FusedAttention,
            "sdpa": SDPAttention,
            "flash": FlashAttention,
            "te": TransformerEngineAttention,
            "reference": UnfusedAttention,
        }
        return kinds[self.kernels.attention]


def solar_layer_spec(arch: Architecture, kernels: KernelConfig, max_positions: int) -> ModuleSpec:
    """One decoder layer: norm, attention over packed QKV, add+norm, gated MLP."""
    provider = SolarSpecProvider(kernels)
    attention = ModuleSpec(
        module=RotarySelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rope": arch.rope,
            "max_positions": max_positions,
            "implementation": kernels.rotary,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=provider.layer_norm(for_qk=True) if arch.block.qk_norm else None,
            k_layernorm=provider.layer_norm(for_qk=True) if arch.block.qk_norm else None,
        ),
    )
    # Of the type ModuleSpec in all but name: Megatron's layer warns of every MLP class in one that it does
    # not know.
    mlp = SimpleNamespace(
        module=GatedMLP,
        params={"implementation": kernels.swiglu},
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
        ),
    )
    return ModuleSpec(
        module=SolarLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=attention,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=mlp,
            # Checkpoint keys as Transformer Engine spells them, so that either spec reads the other's
            # checkpoints.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
