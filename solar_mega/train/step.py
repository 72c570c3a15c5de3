"""One optimizer step and one validation, exact under every TP x PP x VPP x DP x micro-batch split.

A loss is a pair (sum over what counts, how much counted): tokens for language modelling, pairs for DPO.
Megatron adds both over micro-batches and data-parallel ranks and divides once, so the mean over the global
batch does not depend on how it was cut. An `Objective` says how a batch becomes that pair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from solar_mega.model.packing import Packing, packing
from solar_mega.runtime import parallel as ranks

if TYPE_CHECKING:
    from solar_mega.train.guards import Stopwatch

Batch = dict[str, Tensor]
"""tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] fp32; samples packed into one row (b = 1)
bring their offsets too, cu_seqlens [samples + 1] int32 from 0 to s, always on the host."""


class Reduced(NamedTuple):
    """What one micro-batch adds to the global batch."""

    total: Tensor
    """Sum of the losses that count, a differentiable fp32 scalar."""

    count: Tensor
    """How many counted, a scalar."""

    statistics: tuple[Tensor, ...] = ()
    """Sums, one scalar for each name in `Objective.statistics`; reported divided by the global count."""


def masked_sum(token_losses: Tensor, batch: Batch) -> Reduced:
    """token_losses [b, s] summed under the batch's loss mask; what counts are tokens."""
    mask = batch["loss_mask"]
    return Reduced((token_losses.float() * mask).sum(), mask.sum())


@dataclass(frozen=True)
class Objective:
    """How a batch becomes a loss."""

    forward: Callable[[torch.nn.Module, Batch], Tensor]
    """(model chunk, batch) -> its output: on the last stage what `reduce` takes, else hidden states."""

    reduce: Callable[[Tensor, Batch], Reduced] = masked_sum
    """(output of the last stage, batch) -> sums."""

    statistics: tuple[str, ...] = ()
    """Names of what `reduce` reports beside the loss; they become columns of metrics.jsonl."""

    shown: tuple[str, ...] = ()
    """Those of them that the console line has room for."""


def next_token_loss(chunk: torch.nn.Module, batch: Batch) -> Tensor:
    """Causal language modelling: -log p(label | tokens before it), to be summed under the batch's loss
    mask.
    """
    inputs = (batch["tokens"], batch["position_ids"], None)
    return chunk(
        *inputs, labels=batch["labels"], loss_mask=batch["loss_mask"], packed_seq_params=packing_of(batch)
    )


def packing_of(batch: Batch) -> Packing | None:
    """What attention needs to keep packed samples apart; None for a batch without `cu_seqlens`. Every
    pipeline stage asks for itself, from its own copy of the batch."""
    if "cu_seqlens" not in batch:
        return None
    return packing(batch["cu_seqlens"], batch["tokens"].device)


NEXT_TOKEN = Objective(next_token_loss)
"""Pretraining's objective."""


@dataclass(frozen=True)
class Evaluation:
    """Means over a pass without gradients; the same values on every rank."""

    loss: float
    count: int
    """What the means are over: counted tokens, or whatever the objective counts."""
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same values on every rank."""

    loss: float
    """Mean over what counts in the global batch: tokens, or whatever the objective counts."""
    grad_norm: float
    """Global, before clipping."""
    lr: float
    count: int
    """How much counted in the global batch."""
    updated: bool
    """False when the gradient or loss was not finite: the weights are as before the step."""
    statistics: dict[str, float] = field(default_factory=dict)
    """The objective's, as means over `count`."""


@dataclass
class Trainer:
    """Model, optimizer and schedule of this rank, and the objective they are trained on."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    schedule: OptimizerParamScheduler
    objective: Objective
    micro_batch_size: int
    seq_length: int
    pipelined_chunks: bool = False
    """True when the chunks are virtual pipeline stages, each needing its own data iterator."""
    stopwatch: "Stopwatch | None" = None
    """Where the time of this rank's forward passes goes, while somebody asks for it."""
    _reports: list[dict] = field(default_factory=list, init=False)

    def step(self, batches: Iterator[Batch], micro_batches: int) -> StepResult:
        """Forward and backward over `micro_batches` of this data-parallel rank, reduce, clip, update.
        Collective."""
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        seen = self._run(batches, micro_batches, forward_only=False)
        lr = next(group["lr"] for group in self.optimizer.param_groups)
        grad_norm = _clip(self.optimizer) if math.isfinite(seen.loss) else math.nan
        updated = math.isfinite(grad_norm)
        if updated:
            self.optimizer.step_with_ready_grads()
            self.schedule.step(1)
        return StepResult(seen.loss, grad_norm, lr, seen.count, updated, seen.statistics)

    def gather_weights(self) -> None:
        """Completes what `parallel.overlap_param_gather` leaves to the next forward: to be called before
        weights are read in another way (a save, an export). Collective."""
        for chunk in self.chunks:
            chunk.gather_weights()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> Evaluation:
        """Means over `micro_batches` of every data-parallel rank. Collective."""
        for chunk in self.chunks:
            chunk.eval()
        return self._run(batches, micro_batches, forward_only=True)

    def _run(self, batches: Iterator[Batch], micro_batches: int, forward_only: bool) -> Evaluation:
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
        self._reports = reports
        return _global_means(reports, self.objective.statistics)

    def micro_batches(self) -> list[dict]:
        """What this rank saw in its last pass: samples, loss sum and count of each micro-batch. On ranks
        of the last stage; empty elsewhere."""
        seen = []
        for report in self._reports:
            total, count = report["sums"][:2].tolist()
            seen.append({"samples": report["samples"], "loss_sum": total, "count": int(count)})
        return seen

    def _forward(self, batches: Iterator[Batch], chunk: torch.nn.Module):
        batch = on_device(next(batches))
        with self.stopwatch.running() if self.stopwatch is not None else nullcontext():
            output = self.objective.forward(chunk, batch)

        def reduce(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, count, statistics = self.objective.reduce(output, batch)
            sums = torch.stack([value.detach().double() for value in (total, count, *statistics)])
            return total, count.int(), {"sums": sums, "samples": batch.get("sample_ids", [])}

        return output, reduce


def on_device(batch: Batch) -> Batch:
    device = ranks.device()
    if device.type == "cpu":
        return batch
    return {
        key: v.to(device, non_blocking=True) if isinstance(v, Tensor) and key != "cu_seqlens" else v
        for key, v in batch.items()
    }


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


def _global_means(reports: list[dict[str, Tensor]], names: Sequence[str]) -> Evaluation:
    """Means over the global batch on every rank; only last stages have reports."""
    sums = torch.zeros(2 + len(names), dtype=torch.float64, device=ranks.device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        sums = torch.stack([report["sums"] for report in reports]).sum(0)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
    total, count, *statistics = sums.tolist()
    if not count:
        return Evaluation(math.nan, 0, dict.fromkeys(names, math.nan))
    means = {name: value / count for name, value in zip(names, statistics, strict=True)}
    return Evaluation(total / count, int(count), means)
