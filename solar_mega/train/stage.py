"""What every training shares around its data and its loss: pretraining, instruction tuning, DPO.

- prepare: read the source, apply the layer map, check all that can be checked; no process group yet
- build:   groups, model, weights by rows, optimizer, schedule
- train:   the loop, from where the run stopped
- export:  a Hugging Face directory with its lineage

A training brings a `Stage`: its objective, and a function that makes its `Feed` once the ranks are up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.from_hf import check_source, load_weights
from solar_mega.checkpoint.random_weights import RandomWeights
from solar_mega.checkpoint.resume import newest_sound, newest_whole
from solar_mega.checkpoint.run_state import RunState, read_run_state
from solar_mega.checkpoint.source import Source, open_source
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.config.check import TrainingConfig
from solar_mega.config.load import to_toml
from solar_mega.config.schema import CheckpointConfig
from solar_mega.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.runtime import accelerators
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_count, say
from solar_mega.runtime.hardware import peak_flops
from solar_mega.runtime.metrics import MetricsWriter
from solar_mega.runtime.trackers import Sink, Sinks, TensorBoard, WandB
from solar_mega.train.loop import Feed, Outcome, Surroundings, Work, train

if TYPE_CHECKING:
    from torch.nn import Module

    from solar_mega.train.saves import RunSaves
    from solar_mega.train.step import Objective, Trainer


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first process group."""

    source: Source
    layer_map: LayerMap
    base: Architecture
    """At the source's depth."""
    arch: Architecture
    """At the depth trained."""
    tokenizer: Tokenizer
    store: CheckpointStore
    resume_from: Path | None


@dataclass(frozen=True)
class Running:
    """This rank, when model, optimizer and schedule are there and any checkpoint is loaded."""

    trainer: "Trainer"
    dp: int
    dp_rank: int
    first_step: int
    """Steps done by the run so far."""


@dataclass(frozen=True)
class Stage:
    """What one kind of training adds."""

    name: str
    """Its verb; stands in the lineage."""

    objective: "Objective"

    feed: Callable[[Running], Feed]
    """Makes this rank's data; groups exist. Collective."""

    lineage: dict[str, Any] = field(default_factory=dict)
    """What the lineage says beside parent, layer map, steps, tokens and configuration."""

    with_initial_weights: "Callable[[Sequence[Module]], None] | None" = None
    """Called with the model's chunks holding the weights the run began with, before optimizer and resume: for
    a pass over the data with the model as it was. Collective."""

    tokens_per_sample: float | None = None
    """Mean, for the reported rate, where samples are not `train.seq_length` long."""

    side_files: Path | None = None
    """Directory of the tokenizer and other side files of checkpoints and exports; default: the source's."""


T = TypeVar("T")


def prepare_together(
    cfg: TrainingConfig, prepare: Callable[[int], T], resume_from: Callable[[T], Path | None]
) -> T:
    """`prepare(world size)` on every rank. A rank that fails alone (a node without the file system, or
    without an accelerator) fails them all, and all resume from the same checkpoint."""
    world = ranks.world_size()
    if world == 1:
        accelerators.check_accelerators(cfg.parallel, cfg.kernels)
        return prepare(world)
    try:
        ranks.join_world()
        with ranks.together():
            accelerators.check_accelerators(cfg.parallel, cfg.kernels)
            prepared = prepare(world)
        seen = ranks.gather(resume_from(prepared))
        if len(set(seen)) > 1:
            raise UserError(
                "output.dir: the ranks see different checkpoints to resume from: "
                f"{', '.join(sorted({str(path) for path in seen}))}; it must lie on a file system that all "
                "nodes share"
            )
    except BaseException:
        ranks.stop()
        raise
    return prepared


def prepare_model(cfg: TrainingConfig, tokenizer: Path | None = None) -> Prepared:
    """Read headers and configs, check them against each other; touches no weights and starts nothing.

    Args:
        tokenizer: directory or SentencePiece model to use in place of the source's own.

    Raises:
        UserError: source, layer map, layout, tokenizer or resume point do not fit.
    """
    source = open_source(cfg.model.path)
    base = Architecture.from_hf(source.config, f"{source.path}/config.json")
    layer_map = LayerMap.parse(cfg.model.layer_map, base.num_layers)
    arch = base.grown(layer_map)
    problems = check_layout(arch, cfg.parallel, cfg.train.seq_length)
    if layer_map.fresh and cfg.model.weights == "pretrained":
        problems.add(
            f'model.layer_map = "{layer_map}": target layers {", ".join(map(str, layer_map.fresh))} are '
            "fresh, and the source has no weights for them; use a map that copies every layer"
        )
    problems.raise_if_any("the model does not fit the run")
    if source.kind == "hf" and cfg.model.weights == "pretrained":
        check_source(HFDirectory(source.path).tensors, base, str(source.path))
    loaded = load_tokenizer(tokenizer or source.side_files)
    check_vocabulary(loaded, arch.vocab_size)
    store = CheckpointStore(cfg.output.dir / "checkpoints", cfg.checkpoint.keep)
    return Prepared(source, layer_map, base, arch, loaded, store, _resume_point(cfg, store))


def _resume_point(cfg: TrainingConfig, store: CheckpointStore) -> Path | None:
    latest = newest_whole(store, cfg.checkpoint.fallback)
    if cfg.checkpoint.resume == "must" and latest is None:
        raise UserError(f'checkpoint.resume = "must", but {store.root} holds no complete checkpoint')
    if cfg.checkpoint.resume == "never" and (
        latest is not None or (cfg.output.dir / "metrics.jsonl").exists()
    ):
        raise UserError(
            f'output.dir = {str(cfg.output.dir)!r} already holds a run; checkpoint.resume = "never" does not '
            'write over it. Choose another directory, or "auto" to continue'
        )
    if latest is not None:
        _check_resumable(cfg, latest)
    return latest


def _check_resumable(cfg: TrainingConfig, checkpoint: Path) -> None:
    """The data position is counted in samples of one length, so neither their number per step nor their
    length may change within a run."""
    state = read_run_state(checkpoint)
    problems = Problems()
    if state.step > cfg.train.steps:
        problems.add(f"train.steps = {cfg.train.steps}: the run is already at step {state.step}")
    if state.step:
        batch, tokens = state.consumed_samples // state.step, state.consumed_tokens // state.consumed_samples
        if batch != cfg.train.global_batch_size:
            problems.add(f"train.global_batch_size = {cfg.train.global_batch_size}: the run has {batch}")
        if tokens != cfg.train.seq_length:
            problems.add(f"train.seq_length = {cfg.train.seq_length}: the run has {tokens}")
    problems.raise_if_any(
        f"cannot resume from {checkpoint} (set these back, or give the new run its own output.dir)"
    )


def run_stage(cfg: TrainingConfig, prepared: Prepared, stage: Stage) -> Outcome:
    """Build, resume, train, export; every rank of the world calls this, inside `ranks.running`.

    Raises UserError for bad input, and when the loss is no longer finite.
    """
    from megatron.core import parallel_state

    from solar_mega.checkpoint.megatron import load_checkpoint
    from solar_mega.model.builder import build_for_training
    from solar_mega.train.guards import memory_guard
    from solar_mega.train.optimizer import build_optimizer, build_schedule, freeze_layers, wrap
    from solar_mega.train.step import Trainer

    arch, resume_from = prepared.arch, _sound(prepared, cfg.checkpoint)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    chunks = build_for_training(arch, cfg.parallel, cfg.train, cfg.kernels)
    if resume_from is None or stage.with_initial_weights is not None:
        load_initial_weights(cfg, prepared, chunks)
    if stage.with_initial_weights is not None:
        stage.with_initial_weights(chunks)
    freeze_layers(chunks, prepared.layer_map.frozen)
    wrapped = wrap(chunks, cfg.parallel)
    optimizer = build_optimizer(wrapped, cfg.optimizer, cfg.parallel, cfg.train.precision)
    schedule = build_schedule(optimizer, cfg.schedule, cfg.optimizer, cfg.train.steps)
    first_step = 0
    if resume_from is not None:
        state = load_checkpoint(resume_from, chunks, optimizer, None)
        schedule.load_state_dict(state.schedule)
        first_step = state.step
        say(f"resumed from {resume_from} at step {first_step}")
    trainer = Trainer(
        wrapped,
        optimizer,
        schedule,
        stage.objective,
        cfg.train.micro_batch_size,
        cfg.train.seq_length,
        pipelined_chunks=cfg.parallel.vpp > 1,
    )
    say(describe(cfg, prepared, dp))

    tokens_per_sample = stage.tokens_per_sample or cfg.train.seq_length
    work = Work(
        tokens_per_step=round(cfg.train.global_batch_size * tokens_per_sample),
        flops_per_token=arch.flops_per_token(cfg.train.seq_length),
        world=ranks.world_size(),
        peak_flops=peak_flops(cfg.train.precision),
    )
    feed = stage.feed(Running(trainer, dp, dp_rank, first_step))
    with ranks.together():
        metrics = _open_metrics(cfg, first_step)
    with memory_guard(cfg.output.dir), _saves(cfg, prepared, stage, trainer, chunks, dp) as saves:
        around = Surroundings(saves, metrics, cfg.output.dir)
        outcome = train(trainer, feed, work, cfg.train, cfg.checkpoint, around, first_step)
    ranks.set_timeout(ranks.START_TIMEOUT)  # an export takes as long as it takes
    if metrics is not None:
        metrics.close()
    if outcome.stopped_by is None and cfg.output.export_hf:
        _export(cfg, prepared, stage, chunks, outcome.step)
    return outcome


def _sound(prepared: Prepared, config: CheckpointConfig) -> Path | None:
    if prepared.resume_from is None:
        return None
    return newest_sound(prepared.store, prepared.resume_from, config.verify, config.fallback)


def _saves(
    cfg: TrainingConfig, prepared: Prepared, stage: Stage, trainer: "Trainer", chunks: list, dp: int
) -> "RunSaves":
    from solar_mega.checkpoint.saver import Saver
    from solar_mega.train.saves import RunSaves

    def state(step: int) -> RunState:
        return _run_state(cfg, prepared, stage, step, trainer.schedule.state_dict(), dp)

    saver = Saver(prepared.store, cfg.checkpoint.async_save, cfg.checkpoint.hashes)
    optimizer = trainer.optimizer if cfg.checkpoint.save_optimizer else None
    return RunSaves(saver, chunks, optimizer, state, cfg.checkpoint.on_failure)


def load_initial_weights(cfg: TrainingConfig, prepared: Prepared, chunks: list) -> None:
    """The weights a run begins with, through its layer map. Collective."""
    if cfg.model.weights == "pretrained" and prepared.source.kind == "megatron":
        from solar_mega.checkpoint.megatron import load_checkpoint

        load_checkpoint(prepared.source.path, chunks, None, prepared.layer_map)
        return
    if cfg.model.weights == "random":
        weights = RandomWeights(prepared.arch, cfg.train.seed, cfg.model.init_std)
        arch, depth = prepared.arch, prepared.arch.num_layers
        layer_map = LayerMap(depth, tuple(range(depth)), modifiers=prepared.layer_map.modifiers)
    else:
        weights = HFDirectory(prepared.source.path).tensors
        arch, layer_map = prepared.base, prepared.layer_map
    with ranks.together():
        load_weights(chunks, weights, arch, layer_map, cfg.parallel)


def describe(cfg: TrainingConfig, prepared: Prepared, dp: int) -> str:
    """What the run will train, on what, for how long: printed at the start and by `--dry-run`."""
    arch, parallel, run = prepared.arch, cfg.parallel, cfg.train
    origin = "random weights in the shape of" if cfg.model.weights == "random" else "weights of"
    chunks = f" x vpp {parallel.vpp}" if parallel.vpp > 1 else ""
    tokens = run.steps * run.global_batch_size * run.seq_length
    flops = tokens * arch.flops_per_token(run.seq_length)
    return "\n".join(
        (
            f"model     {origin} {prepared.source.path}",
            prepared.layer_map.describe(),
            f"size      {arch.num_layers} layers, {human_count(arch.parameters())} parameters (source: "
            f"{prepared.base.num_layers} layers, {human_count(prepared.base.parameters())})",
            f"layout    tp {parallel.tp} x pp {parallel.pp}{chunks} x dp {dp}, {run.precision}",
            f"kernels   {accelerators.describe(parallel, cfg.kernels)}",
            f"training  {run.steps} steps, {human_count(tokens)} tokens, {flops:.2e} FLOP",
            f"output    {cfg.output.dir}",
            *(f"not here  {text}" for text in _absent(cfg)),
        )
    )


def _absent(cfg: TrainingConfig) -> list[str]:
    """Accelerators that this machine lacks: no reason not to look at a run that others will make."""
    wanted = accelerators.needs(cfg.parallel, cfg.kernels)
    return accelerators.missing(wanted, accelerators.this_device()) if wanted else []


def _run_state(
    cfg: TrainingConfig, prepared: Prepared, stage: Stage, step: int, schedule: dict[str, Any], dp: int
) -> RunState:
    return RunState(
        step=step,
        consumed_samples=step * cfg.train.global_batch_size,
        consumed_tokens=step * cfg.train.global_batch_size * cfg.train.seq_length,
        schedule=schedule,
        hf_config=dict(prepared.arch.hf_config),
        config_toml=to_toml(cfg),
        parallel={"tp": cfg.parallel.tp, "pp": cfg.parallel.pp, "vpp": cfg.parallel.vpp, "dp": dp},
        source=str(_side_files(prepared, stage).resolve()),
        lineage=_lineage(cfg, prepared, stage, step),
        seed=cfg.train.seed,
    )


def _side_files(prepared: Prepared, stage: Stage) -> Path:
    return stage.side_files or prepared.source.side_files


def _open_metrics(cfg: TrainingConfig, first_step: int) -> Sink | None:
    if not ranks.is_main():
        return None
    cfg.output.dir.mkdir(parents=True, exist_ok=True)
    (cfg.output.dir / "config.toml").write_text(to_toml(cfg))
    metrics = MetricsWriter(cfg.output.dir / "metrics.jsonl")
    # A fresh start over a run killed before its first checkpoint keeps none of its lines.
    metrics.truncate_after(first_step if first_step else -1)
    sinks: list[Sink] = [metrics]
    if cfg.output.tensorboard:
        sinks.append(TensorBoard(cfg.output.dir, first_step))
    if cfg.output.wandb is not None:
        sinks.append(WandB(cfg.output.dir, cfg.output.wandb, cfg.output.wandb_mode, to_toml(cfg)))
    return Sinks(sinks)


def _lineage(cfg: TrainingConfig, prepared: Prepared, stage: Stage, step: int) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "parent": str(prepared.source.path.resolve()),
        "weights": cfg.model.weights,
        "layer_map": prepared.layer_map.to_json(),
        "steps": step,
        "tokens": step * cfg.train.global_batch_size * cfg.train.seq_length,
        "config": to_toml(cfg),
        **stage.lineage,
    }


def _export(cfg: TrainingConfig, prepared: Prepared, stage: Stage, chunks: list, step: int) -> None:
    from solar_mega.checkpoint.to_hf import export_hf
    from solar_mega.model.builder import DTYPES

    destination = cfg.output.dir / "hf"
    precision = cfg.output.export_precision or prepared.source.precision
    export_hf(
        chunks,
        prepared.arch,
        cfg.parallel,
        destination,
        side_files=_side_files(prepared, stage),
        dtype=DTYPES[precision],
        shard_size=cfg.output.shard_size,
        lineage=_lineage(cfg, prepared, stage, step),
    )
    say(f"exported  {destination}")
