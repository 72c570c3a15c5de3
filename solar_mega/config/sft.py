"""What `solar-mega sft` can be told.

Instruction tuning of SOLAR 10.7B: Kim et al., arXiv 2312.15166, sections 3.2 and 4.1.
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


@dataclass(frozen=True)
class SFTTrainConfig(TrainConfig):
    steps: int = 0
    """Optimizer steps of the whole run; 0: as many as `data.epochs` take."""

    seq_length: int = 4096
    """Tokens of a row that conversations are packed into, and the longest conversation."""

    global_batch_size: int = 64
    """Rows per optimizer step over all ranks."""

    eval_samples: int = 0
    """Rows used of `data.valid`, packed likewise; 0: all of them."""


@dataclass(frozen=True)
class SFTDataConfig:
    train: tuple[str, ...]
    """Data sets, `FORMAT PATH [samples=N] [rows=A:B] [split=NAME]`, mixed by shuffling them together.
    Formats: alpaca, openorca, metamath, sharegpt, openai, plain. PATH: json, jsonl, parquet, a dataset
    directory, a directory of such files, or a name on the Hugging Face Hub."""

    valid: tuple[str, ...] = ()
    """Held-out data sets, likewise; empty turns validation off."""

    template: str = "alpaca"
    """Chat template: `alpaca` (the paper's), `solar`, `tokenizer` (the tokenizer's own) or a Jinja file. It
    is written into the exported tokenizer."""

    tokenizer: Path | None = None
    """Tokenizer directory or SentencePiece model; default: the model's own."""

    epochs: float = 1.0
    """Passes over the conversations, where `train.steps` is 0."""

    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of conversations longer than `train.seq_length`: left out, or cut at the end. Either is
    counted."""

    strict: bool = False
    """Stop at rows that cannot be trained on as they are (missing fields, empty responses, mixed roles, too
    long), listing them, instead of leaving them out."""

    packing: bool = True
    """Several conversations to a row; false puts each in a row of its own."""

    neftune_alpha: float = 0.0
    """Strength of the uniform noise on embeddings (NEFTune, arXiv 2310.05914); 0 for none, 5 is usual."""

    cache: Path | None = None
    """Where tokenised data sets are kept; default: `<output.dir>/data_cache`."""


@dataclass(frozen=True)
class SFTOutputConfig(OutputConfig):
    export_best: bool = False
    """Write the model of the lowest validation loss so far too, as a Hugging Face directory `<dir>/best`."""


@dataclass(frozen=True)
class SFTConfig:
    """`solar-mega sft`: instruction tuning on conversations, with the loss on what the assistant says."""

    model: ModelConfig
    data: SFTDataConfig
    output: SFTOutputConfig
    train: SFTTrainConfig = field(default_factory=SFTTrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, weight_decay=0.0))
    schedule: SampleScheduleConfig = field(default_factory=SampleScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)


def check_sft(cfg: SFTConfig, world_size: int) -> None:
    """Raises UserError listing everything that is wrong with `cfg`, whose `train.steps` is known."""
    check_training(cfg, world_size, _check_instructions)


def _check_instructions(cfg: C, problems: Problems) -> None:
    data = cfg.data
    if not data.train:
        problems.add('data.train: no data set; write for instance ["alpaca alpaca_gpt4.json"]')
    check_samples(cfg, problems)
    if not 0 <= data.neftune_alpha < math.inf:
        problems.add(f"data.neftune_alpha = {data.neftune_alpha}: must be at least 0")
    if cfg.output.export_best and not data.valid:
        problems.add("output.export_best = true needs data.valid: the best is told by the validation loss")
