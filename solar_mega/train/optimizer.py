"""Model chunks -> Megatron's DDP, its (distributed) optimizer, and the learning-rate schedule."""

import functools
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from solar_mega.config.schema import OptimizerConfig, ParallelConfig, Precision, ScheduleConfig
from solar_mega.model.linear import ColumnLinear, RowLinear
from solar_mega.runtime import parallel as ranks


class Replica(DistributedDataParallel):
    """Megatron's DDP with gradient buffers that products of `model.linear` overwrite rather than add to.

    With overlap, a bucket's reduction starts when the last micro-batch's backward has been through all its
    weights, and updated weights are gathered from the next forward's hooks on. Whoever reads weights outside
    a forward calls `gather_weights` first.
    """

    def zero_grad_buffer(self) -> None:
        """Begins a step."""
        if ranks.device().type == "cuda":
            super().zero_grad_buffer()
        else:
            for parameter in self.params_with_grad:
                parameter.grad_added_to_main_grad = False
                parameter.main_grad_is_stale = parameter in self._overwritten
                if not parameter.main_grad_is_stale:
                    parameter.main_grad.zero_()
            for group in self.bucket_groups:
                group.reset()
        self._start_gather()

    @functools.cached_property
    def _overwritten(self) -> set[torch.nn.Parameter]:
        linears = (module for module in self.module.modules() if isinstance(module, ColumnLinear | RowLinear))
        return {linear.weight for linear in linears if linear.weight.requires_grad}

    def _start_gather(self) -> None:
        """Begins to gather the updated weights that the next forward uses first, where the schedule does not:
        stages that wait for their first input have time for it."""
        if self.use_forward_hook and not self.ddp_config.align_param_gather:
            for group in self.bucket_groups[-1:]:
                if not group.param_gather_dispatched:
                    group.start_param_sync()

    def gather_weights(self) -> None:
        """Every weight of this rank is up to date when it returns. Collective over the replicas."""
        if not self.use_forward_hook:
            return
        for group in self.bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)

    def _make_backward_post_hook(self, parameter: torch.nn.Parameter) -> Callable[..., None]:
        """Megatron's hook, for gradients that a product has already put into the buffer and autograd never
        saw; Megatron's asks for a `grad` when communication overlaps."""

        def hook(*_: object) -> None:
            gradient, parameter.grad = parameter.grad, None
            stale = getattr(parameter, "main_grad_is_stale", False)
            if gradient is not None and stale:
                parameter.main_grad_is_stale = False
                parameter.main_grad.copy_(gradient)
            elif gradient is not None and not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(gradient)
            if not self.ddp_config.overlap_grad_reduce:
                return
            group = self.param_to_bucket_group[parameter]
            if group.is_last_microbatch:
                _zero_if_stale(parameter)  # before the bucket that it lies in is reduced
            group.register_grad_ready(parameter)

        return hook

    def start_grad_sync(self, *unused) -> None:
        self._zero_what_is_stale()
        super().start_grad_sync(*unused)

    def finish_grad_sync(self, *unused, **options) -> None:
        self._zero_what_is_stale()
        super().finish_grad_sync(*unused, **options)

    def _zero_what_is_stale(self) -> None:
        """Weights that no product of this step had a gradient for."""
        for parameter in self._overwritten:
            _zero_if_stale(parameter)


def _zero_if_stale(parameter: torch.nn.Parameter) -> None:
    if getattr(parameter, "main_grad_is_stale", False):
        parameter.main_grad_is_stale = False
        parameter.main_grad.zero_()


class LoneReplica(Replica):
    """A replica without others: Megatron's collectives would copy every gradient and weight onto itself."""

    def start_grad_sync(self, *unused) -> None:
        self._zero_what_is_stale()

    def finish_grad_sync(self, *unused, **options) -> None:
        self._zero_what_is_stale()

    def start_param_sync(self, *unused, **options) -> None: ...


def freeze_layers(chunks: Sequence[GPTModel], layers: Collection[int]) -> None:
    """Takes the layers with these numbers in the whole model (`LayerMap.frozen`) out of training: no weight
    gradient, no optimizer state, no weight decay. To be called before `wrap`, at every start of a run.

    Embeddings, final norm and head are trained all the same.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 in layers:
                layer.requires_grad_(False)


def wrap(
    chunks: Sequence[GPTModel], parallel: ParallelConfig, lean: bool = True
) -> list[DistributedDataParallel]:
    """Each chunk under Megatron's DDP: contiguous fp32 gradient buffers, reduced once per global batch.

    The chunks must hold their final weights: the optimizer copies its master weights from them. `lean=False`
    is Megatron's own class throughout (the benchmark's stock peer).
    """
    alone = parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce and not alone,
        overlap_param_gather=parallel.overlap_param_gather and not alone,
        # The interleaved schedule starts the gathers, of the next chunk while one computes.
        align_param_gather=parallel.overlap_param_gather and parallel.vpp > 1,
        bucket_size=parallel.bucket_size,
    )
    replica = (LoneReplica if alone else Replica) if lean else DistributedDataParallel
    wrapped = [
        # One bucket for all but the first chunk: later chunks' gradients are ready together (interleaved
        # schedule).
        replica(chunk.config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    _tell_the_schedule(wrapped, ddp)
    return wrapped


def _tell_the_schedule(
    wrapped: Sequence[DistributedDataParallel], ddp: DistributedDataParallelConfig
) -> None:
    """Which calls of its chunks Megatron's pipeline schedule makes: no reduction before a step's last
    micro-batch, gathers ahead of their chunk."""
    if ddp.overlap_grad_reduce:
        held = [_weakly(chunk.no_sync) for chunk in wrapped]
        for chunk in wrapped:
            chunk.config.no_sync_func = held if len(held) > 1 else held[0]
    if ddp.overlap_param_gather and ddp.align_param_gather:
        for chunk in wrapped:
            chunk.config.param_sync_func = [_weakly(one.start_param_sync) for one in wrapped]


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The bound method, without keeping its object alive.

    model -> config -> method -> model, where gradient hooks are part of the way, is a circle that Python's
    collector cannot see through, and a process that trains twice (a ladder's rungs) would keep both models.
    """
    reference = weakref.WeakMethod(method)
    return lambda *arguments: reference()(*arguments)


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    parallel: ParallelConfig,
    precision: Precision,
    fused: bool = True,
) -> MegatronOptimizer:
    """AdamW with decoupled weight decay, none on norms and biases; fp32 master weights under bf16.

    `fused=False` leaves the implementation to Megatron (the benchmark's stock peer).
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16",
            params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
        ),
        list(wrapped),
    )
    if fused:
        _use_fused_adam(optimizer)
    for chunk in wrapped:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = _weakly(optimizer.scale_loss)
    return optimizer


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """One kernel for the whole update instead of a dozen passes over memory.

    Without Transformer Engine and apex, Megatron builds torch's AdamW and leaves its slowest path on.
    """
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        torch_optimizer = inner.optimizer
        if isinstance(torch_optimizer, torch.optim.AdamW):
            for group in torch_optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


def build_schedule(
    optimizer: MegatronOptimizer, config: ScheduleConfig, optimizer_config: OptimizerConfig, steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then cosine, WSD or constant. Step k (from 1) has the rate of k - 1 steps done.

    A resumed schedule takes its position from the checkpoint, all else from the configuration at hand.
    """
    wsd = config.kind == "wsd"
    decay_steps = steps if wsd else (config.decay_steps or steps)
    if config.kind == "constant":
        decay_steps = config.warmup_steps + 1  # unused, but Megatron wants it beyond the warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style={"cosine": "cosine", "wsd": "WSD", "constant": "constant"}[config.kind],
        start_wd=optimizer_config.weight_decay,
        end_wd=optimizer_config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=(config.decay_steps or max(1, steps // 10)) if wsd else None,
        lr_wsd_decay_style=config.wsd_decay if wsd else None,
    )
