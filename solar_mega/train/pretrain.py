"""`solar-mega pretrain`: (continued) pretraining of a model grown through a layer map (paper, section 2).

- prepare: read the source, apply the layer map, check all that can be checked; no process group yet
- build:   groups, model, weights by rows, optimizer, schedule, data
- train:   the shared loop
- export:  a Hugging Face directory with its lineage
"""

from dataclasses import dataclass
from pathlib import Path

from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.from_hf import check_source, load_weights
from solar_mega.checkpoint.random_weights import RandomWeights
from solar_mega.checkpoint.run_state import read_run_state
from solar_mega.checkpoint.source import Source, open_source
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.config.check import check_pretrain
from solar_mega.config.load import to_toml
from solar_mega.config.schema import PretrainConfig
from solar_mega.data.corpora import check_corpora
from solar_mega.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_count, say
from solar_mega.runtime.hardware import peak_flops
from solar_mega.runtime.metrics import MetricsWriter
from solar_mega.train.loop import Feed, Outcome, Work, train


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


def pretrain(cfg: PretrainConfig) -> Outcome:
    """Train as `cfg` says; every rank of the world calls this.

    Raises UserError for bad input, before any work, and when the loss is no longer finite.
    """
    prepared = _prepare_together(cfg)
    with ranks.running(cfg.parallel, cfg.train.seed, cfg.train.threads):
        return _run(cfg, prepared)


def _prepare_together(cfg: PretrainConfig) -> Prepared:
    """`prepare` on every rank. A rank that fails alone (a node without the file system) fails them all, and
    all resume from the same checkpoint."""
    world = ranks.world_size()
    if world == 1:
        return prepare(cfg, world)
    try:
        ranks.join_world()
        with ranks.together():
            prepared = prepare(cfg, world)
        seen = ranks.gather(prepared.resume_from)
        if len(set(seen)) > 1:
            raise UserError(
                f"output.dir = {str(cfg.output.dir)!r}: the ranks see different checkpoints to resume from: "
                f"{', '.join(sorted({str(path) for path in seen}))}; it must lie on a file system that all "
                "nodes share"
            )
    except BaseException:
        ranks.stop()
        raise
    return prepared


def prepare(cfg: PretrainConfig, world: int) -> Prepared:
    """Read headers and configs, check them against each other; touches no weights and starts nothing."""
    check_pretrain(cfg, world)
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
    tokenizer = load_tokenizer(cfg.data.tokenizer or source.side_files)
    check_vocabulary(tokenizer, arch.vocab_size)
    check_corpora(
        cfg.data,
        cfg.train.seq_length,
        validation=cfg.train.eval_samples > 0,
        vocab_size=arch.vocab_size,
        eos_id=tokenizer.eos_id,
        fingerprint=tokenizer.fingerprint,
    )
    store = CheckpointStore(cfg.output.dir / "checkpoints", cfg.checkpoint.keep)
    return Prepared(source, layer_map, base, arch, tokenizer, store, _resume_point(cfg, store))


def _resume_point(cfg: PretrainConfig, store: CheckpointStore) -> Path | None:
    latest = store.latest()
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


def _check_resumable(cfg: PretrainConfig, checkpoint: Path) -> None:
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


def _run(cfg: PretrainConfig, prepared: Prepared) -> Outcome:
    from megatron.core import parallel_state

    from solar_mega.checkpoint.megatron import load_checkpoint, save_checkpoint
    from solar_mega.checkpoint.run_state import RunState
    from solar_mega.model.builder import build_for_training
    from solar_mega.train.optimizer import build_optimizer, build_schedule, wrap
    from solar_mega.train.step import Trainer, next_token_loss

    arch = prepared.arch
    dp = parallel_state.get_data_parallel_world_size()
    chunks = build_for_training(arch, cfg.parallel, cfg.train, cfg.kernels)
    _load_initial_weights(cfg, prepared, chunks)
    wrapped = wrap(chunks, cfg.parallel)
    optimizer = build_optimizer(wrapped, cfg.optimizer, cfg.parallel, cfg.train.precision)
    schedule = build_schedule(optimizer, cfg.schedule, cfg.optimizer, cfg.train.steps)
    first_step = 0
    if prepared.resume_from is not None:
        state = load_checkpoint(prepared.resume_from, chunks, optimizer, None)
        schedule.load_state_dict(state.schedule)
        first_step = state.step
        say(f"resumed from {prepared.resume_from} at step {first_step}")
    trainer = Trainer(
        wrapped,
        optimizer,
        schedule,
        next_token_loss,
        cfg.train.micro_batch_size,
        cfg.train.seq_length,
        pipelined_chunks=cfg.parallel.vpp > 1,
    )
    say(describe(cfg, prepared, dp))

    def save(step: int) -> None:
        state = RunState(
            step=step,
            consumed_samples=step * cfg.train.global_batch_size,
            consumed_tokens=step * cfg.train.global_batch_size * cfg.train.seq_length,
            schedule=schedule.state_dict(),
            hf_config=dict(arch.hf_config),
            config_toml=to_toml(cfg),
            parallel={"tp": cfg.parallel.tp, "pp": cfg.parallel.pp, "vpp": cfg.parallel.vpp, "dp": dp},
            source=str(prepared.source.side_files.resolve()),
            lineage=_lineage(cfg, prepared, step),
            seed=cfg.train.seed,
        )
        save_checkpoint(prepared.store, chunks, optimizer if cfg.checkpoint.save_optimizer else None, state)

    work = Work(
        tokens_per_step=cfg.train.global_batch_size * cfg.train.seq_length,
        flops_per_token=arch.flops_per_token(cfg.train.seq_length),
        world=ranks.world_size(),
        peak_flops=peak_flops(cfg.train.precision),
    )
    feed = _feed(cfg, prepared, dp, parallel_state.get_data_parallel_rank(), first_step)
    with ranks.together():
        metrics = _open_metrics(cfg, first_step)
    outcome = train(trainer, feed, work, cfg.train, cfg.checkpoint, metrics, save, first_step)
    if outcome.stopped_by is None and cfg.output.export_hf:
        _export(cfg, prepared, chunks, outcome.step)
    return outcome


def _load_initial_weights(cfg: PretrainConfig, prepared: Prepared, chunks: list) -> None:
    if prepared.resume_from is not None:
        return
    if cfg.model.weights == "pretrained" and prepared.source.kind == "megatron":
        from solar_mega.checkpoint.megatron import load_checkpoint

        load_checkpoint(prepared.source.path, chunks, None, prepared.layer_map)
        return
    if cfg.model.weights == "random":
        weights = RandomWeights(prepared.arch, cfg.train.seed, cfg.model.init_std)
        arch, layer_map = prepared.arch, LayerMap.parse("identity", prepared.arch.num_layers)
    else:
        weights = HFDirectory(prepared.source.path).tensors
        arch, layer_map = prepared.base, prepared.layer_map
    with ranks.together():
        load_weights(chunks, weights, arch, layer_map, cfg.parallel)


def describe(cfg: PretrainConfig, prepared: Prepared, dp: int) -> str:
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
            f"size      {arch.num_layers} layers, {human_count(arch.parameters())} parameters "
            f"(source: {prepared.base.num_layers} layers, {human_count(prepared.base.parameters())})",
            f"layout    tp {parallel.tp} x pp {parallel.pp}{chunks} x dp {dp}, {run.precision}",
            f"training  {run.steps} steps, {human_count(tokens)} tokens, {flops:.2e} FLOP",
            f"output    {cfg.output.dir}",
        )
    )


def _feed(cfg: PretrainConfig, prepared: Prepared, dp: int, dp_rank: int, first_step: int) -> Feed:
    from solar_mega.data.batches import Batches
    from solar_mega.data.datasets import build_datasets

    run, batch = cfg.train, cfg.train.global_batch_size
    train_set, valid_set = build_datasets(
        cfg.data,
        seq_length=run.seq_length,
        train_samples=run.steps * batch,
        valid_samples=run.eval_samples,
        seed=run.seed,
        eos_id=prepared.tokenizer.eos_id,
        cache_dir=cfg.data.cache or cfg.output.dir / "data_cache",
        vocab_size=prepared.arch.vocab_size,
        fingerprint=prepared.tokenizer.fingerprint,
    )
    training = Batches(train_set, first_step * batch, run.micro_batch_size, dp_rank, dp, batch)

    def validation():
        return iter(Batches(valid_set, 0, run.micro_batch_size, dp_rank, dp, run.eval_samples))

    return Feed(
        train=iter(training),
        validation=validation if run.eval_samples else None,
        train_micro_batches=batch // (run.micro_batch_size * dp),
        validation_micro_batches=run.eval_samples // (run.micro_batch_size * dp),
        wait_seconds=lambda: training.wait_seconds,
    )


def _open_metrics(cfg: PretrainConfig, first_step: int) -> MetricsWriter | None:
    if not ranks.is_main():
        return None
    cfg.output.dir.mkdir(parents=True, exist_ok=True)
    (cfg.output.dir / "config.toml").write_text(to_toml(cfg))
    metrics = MetricsWriter(cfg.output.dir / "metrics.jsonl")
    # A fresh start over a run killed before its first checkpoint keeps none of its lines.
    metrics.truncate_after(first_step if first_step else -1)
    return metrics


def _lineage(cfg: PretrainConfig, prepared: Prepared, step: int) -> dict:
    return {
        "stage": "pretrain",
        "parent": str(prepared.source.path.resolve()),
        "weights": cfg.model.weights,
        "layer_map": prepared.layer_map.to_json(),
        "steps": step,
        "tokens": step * cfg.train.global_batch_size * cfg.train.seq_length,
        "config": to_toml(cfg),
    }


def _export(cfg: PretrainConfig, prepared: Prepared, chunks: list, step: int) -> None:
    from solar_mega.checkpoint.to_hf import export_hf
    from solar_mega.model.builder import DTYPES

    destination = cfg.output.dir / "hf"
    precision = cfg.output.export_precision or prepared.source.precision
    export_hf(
        chunks,
        prepared.arch,
        cfg.parallel,
        destination,
        side_files=prepared.source.side_files,
        dtype=DTYPES[precision],
        shard_size=cfg.output.shard_size,
        lineage=_lineage(cfg, prepared, step),
    )
    say(f"exported  {destination}")
