"""A decoder and data small enough to train on every layout within a test."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from solar_mega.config.schema import (
    KernelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
)

SEQUENCE, BATCH, VOCABULARY = 24, 8, 96

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One way to run the same steps."""

    parallel: ParallelConfig = ParallelConfig()
    micro_batch_size: int = 2
    recompute: str = "none"
    tied: bool = False
    precision: Precision = "fp32"
    steps: int = 20
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, clip_grad=0.5)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", warmup_steps=3)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    frozen: tuple[int, ...] = ()
    family: str = "Llama"

    def on(self, tp: int = 1, pp: int = 1, **options: Any) -> "Case":
        return replace(self, parallel=ParallelConfig(tp=tp, pp=pp, **options))


class Samples:
    """Sample i: random tokens with a structure to learn, and an uneven mask, so that micro-batches count
    different numbers of tokens."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        start = int(torch.randint(0, 12, (1,), generator=generator))
        text = (start + torch.arange(SEQUENCE + 1)) % 12 * 8
        noise = torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)
        text = torch.where(torch.rand(SEQUENCE + 1, generator=generator) < 0.1, noise, text)
        counted = int(torch.randint(1, SEQUENCE + 1, (1,), generator=generator))
        return dict(
            tokens=text[:-1],
            labels=text[1:],
            loss_mask=(torch.arange(SEQUENCE) < counted).float(),
            position_ids=torch.arange(SEQUENCE),
        )


@contextmanager
def one_rank(parallel: ParallelConfig | None = None):
    """A world of this process alone, on one thread."""
    from solar_mega.runtime import parallel as ranks

    threads = torch.get_num_threads()
    try:
        with ranks.running(parallel or ParallelConfig(), threads=1):
            yield
    finally:
        torch.set_num_threads(threads)


def architecture(tied: bool = False, **changes: Any):
    from solar_mega.model.architecture import Architecture

    return Architecture.from_hf({**CONFIG, "tie_word_embeddings": tied, **changes})


def start(case: Case, source=None):
    """(chunks, trainer) of this rank with the weights of `source`; drawn by name without one. Groups must
    exist.
    """
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.random_weights import RandomWeights
    from solar_mega.depth.layer_map import LayerMap
    from solar_mega.model.builder import build_model
    from solar_mega.train.optimizer import build_optimizer, build_schedule, freeze_layers, wrap
    from solar_mega.train.step import NEXT_TOKEN, Trainer

    parallel = case.parallel
    arch = architecture(
        case.tied, architectures=[f"{case.family}ForCausalLM"], model_type=case.family.lower()
    )
    chunks = build_model(arch, parallel, case.precision, case.kernels, case.recompute, SEQUENCE)
    identity = LayerMap.parse("identity", arch.num_layers)
    load_weights(chunks, source or RandomWeights(arch, seed=7), arch, identity, parallel)
    freeze_layers(chunks, case.frozen)
    wrapped = wrap(chunks, parallel)
    optimizer = build_optimizer(wrapped, case.optimizer, parallel, case.precision)
    schedule = build_schedule(optimizer, case.schedule, case.optimizer, case.steps)
    trainer = Trainer(
        wrapped,
        optimizer,
        schedule,
        NEXT_TOKEN,
        case.micro_batch_size,
        SEQUENCE,
        pipelined_chunks=parallel.vpp > 1,
    )
    return chunks, trainer


def batches(case: Case, first_sample: int = 0, count: int | None = None):
    """(iterator over this data-parallel rank's micro-batches, how many make a step)."""
    from megatron.core import parallel_state

    from solar_mega.data.batches import Batches

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    data = Batches(Samples(), first_sample, case.micro_batch_size, rank, size, count or BATCH)
    return data, data.micro_batches_per_step


def train(case: Case) -> dict[str, Any]:
    """Takes `case.steps` steps; (loss, gradient norm) of each, and a validation before and after."""
    _, trainer = start(case)
    result = {"validation": [_validate(case, trainer)], "steps": []}
    data, micro_batches = batches(case)
    for _ in range(case.steps):
        step = trainer.step(data, micro_batches)
        assert step.updated
        result["steps"].append((step.loss, step.grad_norm))
    result["validation"].append(_validate(case, trainer))
    return result


def _validate(case: Case, trainer) -> float:
    data, micro_batches = batches(case, first_sample=500_000)
    return trainer.evaluate(data, micro_batches).loss
