"""One optimizer step and one validation, exact under every TP x PP x VPP x DP x micro-batch split.

A loss is a pair (sum over counted tokens, number of counted tokens). Megatron adds both over micro-batches
and data-parallel ranks and divides once, so the mean over the global batch does not depend on how it was cut.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from solar_mega.runtime import parallel as ranks

Batch = dict[str, Tensor]
"""tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] fp32."""

TokenLoss = Callable[[torch.nn.Module, Batch], Tensor]
"""(model chunk, batch) -> the chunk's output: on the last stage a loss per token [b, s], else hidden
states."""


def next_token_loss(chunk: torch.nn.Module, batch: Batch) -> Tensor:
    """Causal language modelling: -log p(label | tokens before it), to be summed under the batch's loss
    mask.
    """
    inputs = (batch["tokens"], batch["position_ids"], None)
    return chunk(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same values on every rank."""

    loss: float
    """Mean over the counted tokens of the global batch."""
    grad_norm: float
    """Global, before clipping."""
    lr: float
    tokens: int
    """Counted tokens of the global batch."""
    updated: bool
    """False when the gradient or loss was not finite: the weights are as before the step."""


@dataclass
class Trainer:
    """Model, optimizer and schedule of this rank, and how a batch becomes a loss."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    schedule: OptimizerParamScheduler
    token_loss: TokenLoss
    micro_batch_size: int
    seq_length: int
    pipelined_chunks: bool = False
    """True when the chunks are virtual pipeline stages, each needing its own data iterator."""

    def step(self, batches: Iterator[Batch], micro_batches: int) -> StepResult:
        """Forward and backward over `micro_batches` of this data-parallel rank, reduce, clip, update.
        Collective."""
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        loss, tokens = self._run(batches, micro_batches, forward_only=False)
        lr = next(group["lr"] for group in self.optimizer.param_groups)
        if not math.isfinite(loss):
            return StepResult(loss, math.nan, lr, tokens, updated=False)
        grad_norm = _clip(self.optimizer)
        if not math.isfinite(grad_norm):
            return StepResult(loss, grad_norm, lr, tokens, updated=False)
        self.optimizer.step_with_ready_grads()
        self.schedule.step(1)
        return StepResult(loss, grad_norm, lr, tokens, updated=True)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Mean loss per counted token over `micro_batches` of every data-parallel rank. Collective."""
        for chunk in self.chunks:
            chunk.eval()
        loss, _ = self._run(batches, micro_batches, forward_only=True)
        return loss

    def _run(self, batches: Iterator[Batch], micro_batches: int, forward_only: bool) -> tuple[float, int]:
        count = len(self.chunks)
        iterators = _replay(batches, micro_batches, count) if self.pipelined_chunks else batches
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators,
            model=list(self.chunks) if count > 1 else self.chunks[0],
            num_microbatches=micro_batches,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return _global_mean(reports)

    def _forward(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        batch = _on_device(next(batches))
        output = self.token_loss(chunk, batch)

        def reduce(token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            mask = batch["loss_mask"]
            total = (token_losses.float() * mask).sum()
            counted = mask.sum()
            report = torch.stack([total.detach().double(), counted.double()])
            return total, counted.int(), {"sum_and_count": report}

        return output, reduce


def _on_device(batch: Batch) -> Batch:
    device = ranks.device()
    if device.type == "cpu":
        return batch
    return {key: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for key, v in batch.items()}


def _clip(optimizer: ChainedOptimizer) -> float:
    """Global gradient norm; gradients (or, fused, the update's reading of them) scaled down to `clip_grad`
    when above it.

    The first half of Megatron's `optimizer.step`, stopped where a norm that is not finite can still be
    refused: Megatron only looks for one when it scales the loss, which bf16 and fp32 do not.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm
    for inner in optimizer.chained_optimizers:
        parameters, limit = inner.get_parameters(), inner.config.clip_grad
        if not parameters or limit <= 0.0:
            continue
        if inner.optimizer.param_groups[0].get("fused"):
            # AdamW's kernel divides each gradient as it reads it: no pass of its own over the gradients.
            excess = (grad_norm + 1.0e-6) / limit
            inner.optimizer.grad_scale = torch.tensor(excess, device=ranks.device()) if excess > 1.0 else None
        else:
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)
    return grad_norm


def _replay(batches: Iterator[Batch], micro_batches: int, copies: int) -> list[Iterator[Batch]]:
    """The interleaved schedule walks the same micro-batches once per chunk."""
    taken = [next(batches) for _ in range(micro_batches)]
    return [iter(taken) for _ in range(copies)]


def _global_mean(reports: list[dict[str, Tensor]]) -> tuple[float, int]:
    """(mean loss, counted tokens) of the global batch on every rank; only last stages have reports."""
    totals = torch.zeros(2, dtype=torch.float64, device=ranks.device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        totals = torch.stack([report["sum_and_count"] for report in reports]).sum(0)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(totals, last, group=parallel_state.get_pipeline_model_parallel_group())
    total, count = totals.tolist()
    return (total / count if count else math.nan), int(count)
