"""Transformer Engine's tensor-parallel linears, through Megatron's wrappers of them. Importing this module
needs the library; `runtime.accelerators` checks that it is there.

Weights have the names, shapes and checkpoint keys of the local linears, so that either reads the other's
checkpoints. The library's extra state holds the scales of FP8's delayed recipe, which is not offered: the
other recipes take theirs from the tensor at hand and have no state.
"""

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from torch import nn
from transformer_engine.pytorch.module.base import initialize_ub

from solar_mega.config.schema import KernelConfig, ParallelConfig


class _Stateless:
    """Nothing but weights in state dicts: torch asks for extra state where a class has methods of its own for
    it."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class ColumnLinear(_Stateless, TEColumnParallelLinear):
    """Weight rows split over the tensor-parallel ranks."""

    def __init__(self, *args, fuse_weight_gradient: bool, **options) -> None:
        super().__init__(*args, **options)
        # Not through Megatron's configuration: its own head would then ask for apex.
        self.fuse_wgrad_accumulation = fuse_weight_gradient


class RowLinear(_Stateless, TERowParallelLinear):
    """Weight columns split over the tensor-parallel ranks."""

    def __init__(self, *args, fuse_weight_gradient: bool, **options) -> None:
        super().__init__(*args, **options)
        self.fuse_wgrad_accumulation = fuse_weight_gradient


def allocate_user_buffers(
    tokens: int, hidden_size: int, parallel: ParallelConfig, kernels: KernelConfig
) -> None:
    """The buffers of `parallel.tp_comm_overlap`, before any linear is built. Collective; groups exist.

    Args:
        tokens: of a micro-batch, over all tensor-parallel ranks.
    """
    initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=parallel.tp,
        use_fp8=kernels.fp8 != "off",
        bootstrap_backend="nccl",
    )
