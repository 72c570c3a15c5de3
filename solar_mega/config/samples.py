"""What `sft` and `dpo` have in common: they train on samples of any length, packed into rows, for so many
passes."""

import math
from dataclasses import dataclass

from solar_mega.config.check import C, check_directory
from solar_mega.config.schema import ScheduleConfig
from solar_mega.errors import Problems


@dataclass(frozen=True)
class SampleScheduleConfig(ScheduleConfig):
    warmup_fraction: float = 0.0
    """Share of the steps that warms up, where `warmup_steps` is 0."""


def check_samples(cfg: C, problems: Problems) -> None:
    """What is wrong with the settings that both have."""
    data, warmup = cfg.data, cfg.schedule.warmup_fraction
    if cfg.train.micro_batch_size != 1:
        problems.add(
            f"train.micro_batch_size = {cfg.train.micro_batch_size}: must be 1, a packed row of "
            "train.seq_length tokens; make that longer instead"
        )
    if not 0 < data.epochs < math.inf:
        problems.add(f"data.epochs = {data.epochs}: must be above 0")
    if not 0 <= warmup < 1:
        problems.add(f"schedule.warmup_fraction = {warmup}: must be in [0, 1)")
    if data.tokenizer is not None and not data.tokenizer.exists():
        problems.add(f"data.tokenizer = {data.tokenizer}: no such file or directory")
    check_directory("data.cache", data.cache, problems)
