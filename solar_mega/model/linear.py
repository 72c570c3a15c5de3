"""Megatron's tensor-parallel linears with CPU products that do no work twice.

    y = x Wᵀ          forward, x gathered along the sequence under sequence parallelism
    dx = dy W         summed over the tensor-parallel ranks, or reduce-scattered along the sequence
    dW += dyᵀ x       straight into the parameter's fp32 gradient buffer; the first of a step overwrites it

Megatron adds in place on CUDA with apex only; otherwise it makes dW and adds that to a buffer of zeros.

On processors whose bf16 products are slower than their fp32 ones (`ops.products_in_fp32`), bf16 tensors are
widened for the product and the result rounded once, which is what a bf16 product does inside.

On CUDA everything is Megatron's own.
"""

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor
from torch.autograd.function import once_differentiable

from solar_mega.ops import products_in_fp32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, allreduce_dgrad: bool, sequence_parallel: bool, group, widen: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        ctx.group, ctx.widen = group, widen
        whole = _gather(x, group) if sequence_parallel else x
        return torch.matmul(_for_product(whole, widen), _for_product(weight, widen).t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide_dy = _for_product(dy, ctx.widen)
        dx = torch.matmul(wide_dy, _for_product(weight, ctx.widen)).to(x.dtype)
        reducing = None
        if ctx.sequence_parallel:
            whole_dx, dx = dx, torch.empty_like(x)
            reducing = dist.reduce_scatter_tensor(dx, whole_dx, group=ctx.group, async_op=True)
            x = _gather(x, ctx.group)
        elif ctx.allreduce_dgrad:
            reducing = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dweight = _weight_gradient(weight, wide_dy.flatten(0, -2), x.flatten(0, -2), ctx.widen)
        if reducing is not None:
            reducing.wait()
        return dx, dweight, None, None, None, None


def _for_product(x: Tensor, widen: bool) -> Tensor:
    return x.float() if widen else x


def _gather(x: Tensor, group) -> Tensor:
    """All ranks' parts of the sequence, in a buffer that the next gather reuses."""
    whole = get_global_memory_buffer().get_tensor([x.shape[0] * group.size(), *x.shape[1:]], x.dtype, "mpu")
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _weight_gradient(weight: Tensor, dy: Tensor, x: Tensor, widen: bool) -> Tensor | None:
    """Adds dyᵀ x to `weight.main_grad` where there is one and the product can be made in its dtype."""
    total = getattr(weight, "main_grad", None)
    x = _for_product(x, widen)
    if total is None or total.dtype != dy.dtype:
        return torch.mm(dy.t(), x).to(weight.dtype)
    if getattr(weight, "main_grad_is_stale", False):
        weight.main_grad_is_stale = False
        torch.mm(dy.t(), x, out=total)
    else:
        total.addmm_(dy.t(), x)
    return None


def _product(megatron, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> Tensor:
    if x.is_cuda or not weight.requires_grad or options.get("grad_output_buffer"):
        return megatron(x, weight, bias=bias, **options)
    widen = x.dtype == torch.bfloat16 and products_in_fp32()
    group = options.get("tp_group")
    y = _Linear.apply(x, weight, options["allreduce_dgrad"], options["sequence_parallel"], group, widen)
    return y if bias is None else y + bias


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """Weight rows split over the tensor-parallel ranks."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        return _product(super()._forward_impl, input, weight, bias, options)


class RowLinear(tensor_parallel.RowParallelLinear):
    """Weight columns split over the tensor-parallel ranks."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        return _product(super()._forward_impl, input, weight, bias, options)
