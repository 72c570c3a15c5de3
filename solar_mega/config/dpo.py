"""What `solar-mega dpo` can be told: one DPO step, or the steps of an sDPO ladder.

sDPO: Kim et al., arXiv 2403.19270, used by SOLAR 10.7B (section 3.2). DPO: Rafailov et al., arXiv 2305.18290.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from solar_mega.config.check import C, check_training
from solar_mega.config.samples import SampleScheduleConfig, check_samples
from solar_mega.config.schema import (
    CheckpointConfig,
    KernelConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
    TrainConfig,
)
from solar_mega.errors import Problems

Variant = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sppo_hard", "nca_pair"]


@dataclass(frozen=True)
class PairTrainConfig(TrainConfig):
    steps: int = 0
    """Optimizer steps of a run (of each rung of a ladder); 0: as many as `data.epochs` take."""

    seq_length: int = 2048
    """Tokens of a packed row: whole pairs, each with its prompt twice. At least 2 * data.max_length."""

    global_batch_size: int = 64
    """Pairs per optimizer step over all ranks."""

    eval_samples: int = 0
    """Held-out pairs used of `data.valid`; 0: all of them."""


@dataclass(frozen=True)
class PairDataConfig:
    train: tuple[str, ...] = ()
    """Data sets, `FORMAT PATH [samples=N] [rows=A:B] [split=NAME]`. Formats: plain, orca_dpo_pairs,
    ultrafeedback_allenai, ultrafeedback_argilla, sharegpt, openai."""

    valid: tuple[str, ...] = ()
    """Held-out data sets, likewise; empty turns validation off."""

    template: str = "alpaca"
    """Chat template: `alpaca`, `solar`, `tokenizer` (the tokenizer's own) or a Jinja file. The one the model
    was instruction-tuned with."""

    tokenizer: Path | None = None
    """Tokenizer directory; default: the model's own."""

    epochs: float = 1.0
    """Passes over the pairs, where `train.steps` is 0."""

    max_length: int = 1024
    """Tokens of a prompt and one response (Zephyr's 1024)."""

    max_prompt_length: int = 512
    """Tokens that the prompt of a pair beyond `max_length` keeps, its last ones (Zephyr's 512)."""

    insert_system: bool = True
    """Give conversations without a system message an empty one, as the alignment handbook does."""

    exclude_sources: tuple[str, ...] = ("truthful_qa",)
    """Pairs whose `source` is one of these are left out."""

    exclude_prompts: tuple[Path, ...] = ()
    """Files of prompts (.txt: a line each; else JSON lines with `prompt` or `question`): pairs that ask
    exactly one of them are left out."""

    drop_ties: bool = False
    """Leave out pairs whose responses were scored alike."""

    strict: bool = False
    """Stop at rows that are no pairs (missing fields, empty or equal responses, mixed roles), listing them,
    instead of leaving them out."""

    packing: bool = True
    """Several pairs to a row; false puts each pair in a row of its own."""

    cache: Path | None = None
    """Reference log-probs, shared by the runs that name it; default: `<output.dir>/reference`."""


@dataclass(frozen=True)
class LossConfig:
    variant: Variant = "sigmoid"
    """Loss of a pair; `sigmoid` is DPO."""

    beta: float = 0.1
    """Strength of the tie to the reference model."""

    label_smoothing: float = 0.0
    """Share of preferences taken to be flipped (sigmoid: conservative DPO; robust)."""

    rpo_alpha: float = 0.0
    """Weight of the chosen responses' negative log-likelihood beside the loss."""

    rpo_mean: Literal["tokens", "sequences"] = "tokens"
    """That likelihood as a mean over all chosen tokens of the batch, or over responses of their means."""

    reference_free: bool = False
    """Take the reference's log-probs as 0."""


@dataclass(frozen=True)
class LadderConfig:
    chunks: tuple[str, ...] = ()
    """sDPO: one rung per entry, each a data set as in `data.train`, or several joined by ` + `. Rung t starts
    policy and reference from the result of rung t - 1. Empty: one DPO step on `data.train`."""

    order: Literal["given", "easy_to_hard"] = "given"
    """Rungs as given, or from the chunk on which the first reference model prefers the chosen response most
    often to the one on which it does least."""


@dataclass(frozen=True)
class DPOConfig:
    """`solar-mega dpo`: direct preference optimisation, one step of it or an sDPO ladder."""

    model: ModelConfig
    output: OutputConfig
    train: PairTrainConfig = field(default_factory=PairTrainConfig)
    data: PairDataConfig = field(default_factory=PairDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-7, beta2=0.999, weight_decay=0.0)
    )
    schedule: SampleScheduleConfig = field(default_factory=SampleScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)


def check_dpo(cfg: DPOConfig, world_size: int) -> None:
    """Raises UserError listing everything that is wrong with `cfg`, whose `train.steps` is known."""
    check_training(cfg, world_size, _check_pairs)


def _check_pairs(cfg: C, problems: Problems) -> None:
    data, loss = cfg.data, cfg.loss
    if bool(data.train) == bool(cfg.ladder.chunks):
        problems.add(
            "data.train and ladder.chunks: give one of them (a DPO step on data.train, or a rung per chunk); "
            f"given: {'both' if data.train else 'neither'}"
        )
    check_samples(cfg, problems)
    if not 1 <= data.max_prompt_length < data.max_length:
        problems.add(
            f"data.max_prompt_length = {data.max_prompt_length}: must be at least 1 and below "
            f"data.max_length = {data.max_length}, or nothing is left for the response"
        )
    if cfg.train.seq_length < 2 * data.max_length:
        problems.add(
            f"train.seq_length = {cfg.train.seq_length}: must be at least 2 * data.max_length = "
            f"{2 * data.max_length}, so that every pair fits a row"
        )
    ranges = {
        "loss.beta": (loss.beta, 0 < loss.beta < math.inf, "above 0"),
        "loss.rpo_alpha": (loss.rpo_alpha, 0 <= loss.rpo_alpha < math.inf, "at least 0"),
        "loss.label_smoothing": (loss.label_smoothing, 0 <= loss.label_smoothing < 0.5, "in [0, 0.5)"),
    }
    for key, (value, inside, allowed) in ranges.items():
        if not inside:
            problems.add(f"{key} = {value}: must be {allowed}")
    if loss.label_smoothing and loss.variant not in ("sigmoid", "robust"):
        problems.add(
            f'loss.label_smoothing = {loss.label_smoothing}: loss.variant = "{loss.variant}" has none; use '
            "sigmoid or robust"
        )
