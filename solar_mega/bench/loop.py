"""`solar-mega bench loop`: what the training loop costs beside the steps it takes, and what a save costs.

The bare loop is the shortest that trains: batch, forward and backward through megatron-core's schedule,
clip and update, learning rate. Ours does the same steps with everything around them: prefetched data,
metrics, console line, guards, watchdog, signals. Same weights, same data; blocks of both in turns, so that a
busy machine slows both alike.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from solar_mega.bench.step import StepBench, architecture
from solar_mega.checkpoint.from_hf import load_weights
from solar_mega.checkpoint.random_weights import RandomWeights
from solar_mega.checkpoint.run_state import RunState
from solar_mega.checkpoint.saver import Saver
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.config.schema import (
    CheckpointConfig,
    KernelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from solar_mega.data.batches import Batches
from solar_mega.depth.layer_map import LayerMap
from solar_mega.model.architecture import Architecture
from solar_mega.model.builder import build_model
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say, table
from solar_mega.runtime.metrics import MetricsWriter
from solar_mega.train.loop import Feed, Surroundings, Work, train
from solar_mega.train.optimizer import build_optimizer, build_schedule, wrap
from solar_mega.train.saves import RunSaves
from solar_mega.train.step import NEXT_TOKEN, Trainer


@dataclass(frozen=True)
class LoopBench:
    """Time our training loop beside a bare megatron-core loop, and saves in the background beside saves that
    are waited for."""

    layers: int = 8
    """Decoder layers."""
    hidden: int = 512
    ffn: int = 1536
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 4096
    seq_length: int = 256
    """Tokens per sample."""
    batch: int = 2
    """Samples per step (one micro-batch)."""
    block: int = 8
    """Steps of one loop before it is the other's turn."""
    rounds: int = 8
    """Turns of each, after one untimed."""
    saves: int = 3
    """Saves of each kind; 0 measures the loop alone."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    out: Path | None = None
    """Write the result as JSON to this file."""


class _Samples:
    """Sample i: random tokens drawn from i."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.rest = {"loss_mask": torch.ones(length), "position_ids": torch.arange(length)}

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self.vocabulary, (self.length + 1,), generator=generator)
        return {"tokens": text[:-1], "labels": text[1:], **self.rest}


class _NoSaves:
    def save(self, step: int) -> None: ...
    def save_last(self, step: int) -> None: ...
    def poll(self) -> None: ...


def run(o: LoopBench) -> dict:
    """Measure, print a table, return (and write) the result."""
    shape = StepBench(o.layers, o.hidden, o.ffn, o.heads, o.kv_heads, o.vocab, o.seq_length)
    arch = architecture(shape)
    with ranks.running(ParallelConfig(), threads=o.threads), tempfile.TemporaryDirectory() as folder:
        report = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "parameters": arch.parameters(),
            "shape": {k: v for k, v in vars(o).items() if k != "out"} | {"threads": torch.get_num_threads()},
            "loop": _loops(o, arch, Path(folder)),
        }
        if o.saves:
            report["saves"] = _saves(o, arch, Path(folder))
    if o.out is not None:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _trainer(o: LoopBench, arch: Architecture) -> Trainer:
    parallel = ParallelConfig()
    chunks = build_model(arch, parallel, "fp32", KernelConfig(), max_sequence_length=o.seq_length)
    identity = LayerMap.parse("identity", arch.num_layers)
    load_weights(chunks, RandomWeights(arch, 1), arch, identity, parallel)
    wrapped = wrap(chunks, parallel)
    settings = OptimizerConfig(lr=1e-4)
    optimizer = build_optimizer(wrapped, settings, parallel, "fp32")
    schedule = build_schedule(optimizer, ScheduleConfig(kind="constant"), settings, 10**6)
    return Trainer(wrapped, optimizer, schedule, NEXT_TOKEN, o.batch, o.seq_length)


def _loops(o: LoopBench, arch: Architecture, folder: Path) -> dict:
    ours, bare, samples = _trainer(o, arch), _trainer(o, arch), _Samples(o.vocab, o.seq_length)
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    waited = 0.0
    for number in range(o.rounds + 1):
        for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
            first = number * o.block
            if name == "ours":
                took, wait = _our_block(ours, samples, o, arch, folder, first)
                waited += wait if number else 0.0
            else:
                took = _bare_block(bare, samples, o, first)
            if number:
                seconds[name].append(took / o.block)
    ratios = [mine / other for mine, other in zip(seconds["ours"], seconds["bare"], strict=True)]
    overhead = statistics.median(ratios) - 1
    rows = [
        (name, f"{1e3 * statistics.median(values):.2f}", f"{1e3 * min(values):.2f}")
        for name, values in seconds.items()
    ]
    say(table(rows, ("loop", "ms a step, median", "least")))
    share = waited / (sum(seconds["ours"]) * o.block)
    say(f"overhead {overhead:+.2%} (median of {len(ratios)} pairs); waiting for data {share:.3%} of the time")
    return {
        "overhead": round(overhead, 5),
        "overhead_of_the_least": round(min(seconds["ours"]) / min(seconds["bare"]) - 1, 5),
        "data_wait_share": round(share, 6),
        "seconds_a_step": {name: [round(value, 6) for value in values] for name, values in seconds.items()},
    }


def _our_block(
    trainer: Trainer, samples: _Samples, o: LoopBench, arch: Architecture, folder: Path, first: int
) -> tuple[float, float]:
    """(seconds, of them waiting for data) of `block` steps of the loop as `pretrain` runs it, its start and
    end included."""
    data = Batches(samples, first * o.batch, o.batch, 0, 1, o.batch)
    feed = Feed(iter(data), None, 1, 0, lambda: data.wait_seconds)
    config = TrainConfig(first + o.block, o.seq_length, o.batch, o.batch, "fp32", eval_samples=0)
    work = Work(o.batch * o.seq_length, arch.flops_per_token(o.seq_length), 1, None)
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        around = Surroundings(_NoSaves(), metrics, folder)
        _synchronize()
        begin = time.perf_counter()
        train(trainer, feed, work, config, CheckpointConfig(), around, first)
        _synchronize()
        took = time.perf_counter() - begin
    data.close()
    return took, data.wait_seconds


def _bare_block(trainer: Trainer, samples: _Samples, o: LoopBench, first: int) -> float:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunk, optimizer, forward_backward = trainer.chunks[0], trainer.optimizer, get_forward_backward_func()
    chunk.train()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for index in range(first * o.batch, (first + o.block) * o.batch, o.batch):
            rows = [samples[index + row] for row in range(o.batch)]
            yield {key: torch.stack([row[key] for row in rows]).to(ranks.device()) for key in rows[0]}

    def forward(iterator, model):
        batch = next(iterator)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(losses):
            total = losses.float().sum()
            return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.detach()}

        return output, loss

    iterator = batches()
    _synchronize()
    begin = time.perf_counter()
    for _ in range(o.block):
        optimizer.zero_grad()
        chunk.zero_grad_buffer()
        forward_backward(
            forward_step_func=forward,
            data_iterator=iterator,
            model=chunk,
            num_microbatches=1,
            seq_length=o.seq_length,
            micro_batch_size=o.batch,
            forward_only=False,
        )
        optimizer.step()
        trainer.schedule.step(1)
    _synchronize()
    return time.perf_counter() - begin


def _saves(o: LoopBench, arch: Architecture, folder: Path) -> dict:
    """A save that is waited for; how long one in the background holds the training up; and, as writing takes
    a share of the machine too, how much longer the steps beside it take."""
    trainer, samples = _trainer(o, arch), _Samples(o.vocab, o.seq_length)
    data = Batches(samples, 0, o.batch, 0, 1, o.batch)

    def saves(name: str, asynchronous: bool) -> RunSaves:
        saver = Saver(CheckpointStore(folder / name), asynchronous)
        return RunSaves(saver, [chunk.module for chunk in trainer.chunks], trainer.optimizer, _state, "stop")

    def step() -> float:
        begin = time.perf_counter()
        trainer.step(data, 1)
        return time.perf_counter() - begin

    usual = statistics.median(step() for _ in range(12))
    whole, stalls, beside = [], [], []
    with saves("sync", False) as plain, saves("async", True) as background:
        for number in range(o.saves + 1):  # the first of each sets up what later ones keep
            begin = time.perf_counter()
            plain.save(number)
            whole.append(time.perf_counter() - begin)
            step()
            begin = time.perf_counter()
            background.save(number)
            stall, slowed = time.perf_counter() - begin, 0.0
            while background.saver.pending is not None:
                slowed += step() - usual
                begin = time.perf_counter()
                background.poll()
                stall += time.perf_counter() - begin
            stalls.append(stall)
            beside.append(slowed)
    sync, stall = statistics.median(whole[1:]), statistics.median(stalls[1:])
    say(
        f"a save {sync:.3f} s; in the background it holds the training up {stall:.4f} s "
        f"({stall / sync:.1%}), and slows the steps beside it by {statistics.median(beside[1:]):.3f} s"
    )
    return {
        "sync_seconds": [round(value, 4) for value in whole],
        "async_stall_seconds": [round(value, 4) for value in stalls],
        "stall_over_sync": round(stall / sync, 4),
        "async_slows_steps_beside_it_by_seconds": [round(value, 4) for value in beside],
        "bytes": sum(file.stat().st_size for file in (folder / "sync").glob("step-*/*")) // 2,
    }


def _state(step: int) -> RunState:
    return RunState(step, 0, 0, {}, {}, "", {}, "", {})


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
