"""What is wrong with a configuration, as far as the configuration alone can tell: all of it, before any work.

Questions that need the model (heads and vocabulary over `tp`, layers over `pp * vpp`, the layer map) are
answered where the architecture is known, in `solar_mega.model`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from solar_mega.config.schema import (
    CheckpointConfig,
    KernelConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ParallelConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from solar_mega.config.units import parse_bytes
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.trackers import check_installed


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: least <= value < math.inf), f"at least {least}"


_POSITIVE = ((lambda value: 0 < value < math.inf), "above 0")
_FRACTION = ((lambda value: 0 <= value < 1), "at least 0 and below 1")

RANGES = {
    "model.init_std": _POSITIVE,
    "parallel.tp": _at_least(1),
    "parallel.pp": _at_least(1),
    "parallel.vpp": _at_least(1),
    "parallel.dp": _at_least(1),
    "parallel.bucket_size": _at_least(1),
    "train.steps": _at_least(1),
    "train.seq_length": _at_least(1),
    "train.global_batch_size": _at_least(1),
    "train.micro_batch_size": _at_least(1),
    "train.seed": _at_least(0),
    "train.eval_interval": _at_least(0),
    "train.eval_samples": _at_least(0),
    "train.log_interval": _at_least(1),
    "train.threads": _at_least(1),
    "train.skip_nonfinite": _at_least(0),
    "train.spike_deviations": _at_least(0),
    "train.straggler_interval": _at_least(0),
    "train.hang_seconds": _at_least(0),
    "optimizer.lr": _POSITIVE,
    "optimizer.min_lr": _at_least(0),
    "optimizer.beta1": _FRACTION,
    "optimizer.beta2": _FRACTION,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.clip_grad": _at_least(0),
    "schedule.warmup_steps": _at_least(0),
    "schedule.decay_steps": _at_least(1),
    "checkpoint.interval": _at_least(0),
    "checkpoint.interval_minutes": _at_least(0),
    "checkpoint.keep": _at_least(2),
    "kernels.loss_logits_mib": _at_least(0),
}
"""Key -> (test, what is allowed). None (a setting left to its default) is always allowed."""


class TrainingConfig(Protocol):
    """The sections that the configuration of every training has."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def kernels(self) -> KernelConfig: ...
    @property
    def output(self) -> OutputConfig: ...


C = TypeVar("C", bound=TrainingConfig)


def check_pretrain(cfg: PretrainConfig, world_size: int) -> None:
    """Raises UserError listing everything that is wrong with `cfg` for a run on `world_size` processes."""
    check_training(cfg, world_size, _check_corpora)


def check_training(cfg: C, world_size: int, check_data: Callable[[C, Problems], None]) -> None:
    """What every training's configuration must keep to, and what `check_data` adds of its own.

    Raises UserError listing everything that is wrong with `cfg` for a run on `world_size` processes.
    """
    problems = _problems_of_run(cfg, world_size)
    check_data(cfg, problems)
    _check_places(cfg, problems)
    problems.raise_if_any("configuration")


def check_run(cfg: TrainingConfig, world_size: int) -> None:
    """The part of `check_training` that touches no file: what a plan needs. Raises UserError likewise."""
    _problems_of_run(cfg, world_size).raise_if_any("configuration")


def _problems_of_run(cfg: TrainingConfig, world_size: int) -> Problems:
    problems = Problems()
    _check_ranges(cfg, problems)
    problems.raise_if_any("configuration")  # the arithmetic below takes the ranges for granted
    _check_parallel(cfg.parallel, world_size, problems)
    _check_accelerators(cfg, problems)
    _check_batches(cfg, world_size, problems)
    _check_schedule(cfg, problems)
    return problems


def _check_ranges(cfg: TrainingConfig, problems: Problems) -> None:
    for key, (inside, allowed) in RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(cfg, section), name)
        if value is not None and not inside(value):
            problems.add(f"{key} = {value}: must be {allowed}")


def _check_parallel(parallel: ParallelConfig, world_size: int, problems: Problems) -> None:
    tp, pp, dp = parallel.tp, parallel.pp, parallel.dp
    if dp is not None and world_size != tp * pp * dp:
        problems.add(
            f"world size {world_size} is not parallel.tp * parallel.pp * parallel.dp = {tp} * {pp} * {dp} = "
            f"{tp * pp * dp}; start {tp * pp * dp} processes (torchrun --nproc-per-node) or change the layout"
        )
    elif world_size % (tp * pp):
        problems.add(
            f"world size {world_size} is not a multiple of parallel.tp * parallel.pp = {tp} * {pp} = "
            f"{tp * pp}; start a multiple of {tp * pp} processes (torchrun --nproc-per-node) or change the "
            "layout"
        )
    if parallel.sequence_parallel and tp == 1:
        problems.add("parallel.sequence_parallel = true needs parallel.tp above 1; given 1")
    if parallel.vpp > 1 and pp == 1:
        problems.add(f"parallel.vpp = {parallel.vpp} needs parallel.pp above 1; given 1")
    _check_overlap(parallel, problems)


def _check_overlap(parallel: ParallelConfig, problems: Problems) -> None:
    if parallel.overlap_param_gather:
        absent = [
            key for key in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(parallel, key)
        ]
        if absent:
            needs = " and ".join(f"parallel.{key} = true" for key in absent)
            problems.add(f"parallel.overlap_param_gather = true needs {needs}")
    if parallel.bucket_size is not None and not parallel.overlap_grad_reduce:
        problems.add(
            f"parallel.bucket_size = {parallel.bucket_size} needs parallel.overlap_grad_reduce = true; "
            "without it there is one bucket"
        )


_FP8_TOKENS = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Rows of a matrix that FP8 products take at a time."""


def _check_accelerators(cfg: TrainingConfig, problems: Problems) -> None:
    """What accelerators need of the configuration; what they need of the machine: `runtime.accelerators`."""
    kernels, parallel, train = cfg.kernels, cfg.parallel, cfg.train
    if kernels.attention == "flash" and train.precision != "bf16":
        problems.add(
            f'kernels.attention = "flash" computes in bf16 only; train.precision is "{train.precision}"'
        )
    if kernels.fp8 != "off":
        key = f'kernels.fp8 = "{kernels.fp8}"'
        if kernels.linear != "te":
            problems.add(f'{key} needs kernels.linear = "te"; given "{kernels.linear}"')
        if train.precision != "bf16":
            problems.add(f'{key} needs train.precision = "bf16"; given "{train.precision}"')
        split = parallel.tp if parallel.sequence_parallel else 1
        tokens, rows = train.micro_batch_size * train.seq_length // split, _FP8_TOKENS[kernels.fp8]
        if tokens % rows:
            problems.add(
                f"{key} needs a multiple of {rows} tokens on a rank; train.micro_batch_size * "
                f"train.seq_length{' / parallel.tp' if split > 1 else ''} = {tokens}"
            )
    if parallel.tp_comm_overlap:
        wanted = {
            'kernels.linear = "te"': kernels.linear == "te",
            "parallel.tp above 1": parallel.tp > 1,
            "parallel.sequence_parallel = true": parallel.sequence_parallel,
        }
        absent = [text for text, given in wanted.items() if not given]
        if absent:
            problems.add(f"parallel.tp_comm_overlap = true needs {' and '.join(absent)}")


def _check_batches(cfg: TrainingConfig, world_size: int, problems: Problems) -> None:
    parallel, train = cfg.parallel, cfg.train
    if parallel.sequence_parallel and train.seq_length % parallel.tp:
        problems.add(
            f"train.seq_length = {train.seq_length} is not a multiple of parallel.tp = {parallel.tp}, which "
            "parallel.sequence_parallel splits it into"
        )
    # With the wrong number of processes there is no right answer, but the one asked for can still be checked.
    dp = parallel.dp or max(1, world_size // (parallel.tp * parallel.pp))
    share = train.micro_batch_size * dp
    product = f"train.micro_batch_size * dp = {train.micro_batch_size} * {dp} = {share}"
    if train.global_batch_size % share:
        problems.add(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of {product}; "
            f"nearest: {_nearest_multiple(train.global_batch_size, share)}"
        )
    if train.eval_samples % share:
        problems.add(
            f"train.eval_samples = {train.eval_samples} is not a multiple of {product}; "
            f"nearest: {_nearest_multiple(train.eval_samples, share)}"
        )
    if parallel.vpp == 1:
        return
    # Megatron's interleaved schedule runs the micro-batches in groups of pp.
    for key, samples in (
        ("train.global_batch_size", train.global_batch_size),
        ("train.eval_samples", train.eval_samples),
    ):
        if samples % share == 0 and (samples // share) % parallel.pp:
            problems.add(
                f"{key} = {samples} makes {samples // share} micro-batches per rank; with parallel.vpp = "
                f"{parallel.vpp} their number must be a multiple of parallel.pp = {parallel.pp}"
            )


def _nearest_multiple(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else str(above)


def _check_schedule(cfg: TrainingConfig, problems: Problems) -> None:
    schedule, steps = cfg.schedule, cfg.train.steps
    if cfg.optimizer.min_lr > cfg.optimizer.lr:
        problems.add(f"optimizer.min_lr = {cfg.optimizer.min_lr} is above optimizer.lr = {cfg.optimizer.lr}")
    if schedule.warmup_steps > steps:
        problems.add(f"schedule.warmup_steps = {schedule.warmup_steps} is above train.steps = {steps}")
        return
    if schedule.decay_steps is None:
        decay = {"cosine": 1, "wsd": max(1, steps // 10), "constant": 0}[schedule.kind]  # the least it takes
        if schedule.warmup_steps + decay > steps:
            problems.add(
                f"schedule.warmup_steps = {schedule.warmup_steps} leaves {steps - schedule.warmup_steps} of "
                f'train.steps = {steps} for the decay of schedule.kind = "{schedule.kind}", which takes '
                f"{decay} or more; warm up for less or choose constant"
            )
        return
    if schedule.kind == "cosine" and schedule.decay_steps <= schedule.warmup_steps:
        problems.add(
            f"schedule.decay_steps = {schedule.decay_steps} must be above schedule.warmup_steps = "
            f"{schedule.warmup_steps}; a cosine counts them from the first step"
        )
    if schedule.kind == "wsd" and schedule.decay_steps + schedule.warmup_steps > steps:
        problems.add(
            f"schedule.warmup_steps + schedule.decay_steps = {schedule.warmup_steps} + "
            f"{schedule.decay_steps} is above train.steps = {steps}"
        )


def _check_corpora(cfg: PretrainConfig, problems: Problems) -> None:
    data = cfg.data
    if not data.train:
        problems.add("data.train = []: name at least one corpus, as made by solar-mega tokenize")
    train_share, valid_share = data.split
    if not (0 < train_share <= 1 and 0 <= valid_share < 1 and abs(train_share + valid_share - 1) < 1e-6):
        problems.add(
            f"data.split = [{train_share}, {valid_share}]: must be two shares that sum to 1, "
            "the first above 0"
        )
    elif cfg.train.eval_samples and not data.valid and valid_share == 0:
        problems.add(
            f"train.eval_samples = {cfg.train.eval_samples} but nothing to validate on: data.valid is empty "
            "and data.split gives it 0; name a corpus, give a share, or set train.eval_samples = 0"
        )
    if data.tokenizer is not None and not data.tokenizer.exists():
        problems.add(f"data.tokenizer = {data.tokenizer}: no such file or directory")
    check_directory("data.cache", data.cache, problems)


def check_directory(key: str, place: Path | None, problems: Problems) -> None:
    """`place` will be made if it is not there; it must not be a file."""
    if place is not None and place.exists() and not place.is_dir():
        problems.add(f"{key} = {place}: is a file; name a directory")


def _check_places(cfg: TrainingConfig, problems: Problems) -> None:
    if not cfg.model.path.exists():
        problems.add(f"model.path = {cfg.model.path}: no such directory")
    check_directory("output.dir", cfg.output.dir, problems)
    check_installed(cfg.output.tensorboard, cfg.output.wandb is not None, problems)
    try:
        parse_bytes(cfg.output.shard_size, "output.shard_size")
    except UserError as error:
        problems.add(str(error))
