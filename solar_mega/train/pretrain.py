"""`solar-mega pretrain`: (continued) pretraining of a model grown through a layer map (paper, section 2)."""

from solar_mega.config.check import check_pretrain
from solar_mega.config.schema import PretrainConfig
from solar_mega.data.corpora import check_corpora
from solar_mega.runtime import parallel as ranks
from solar_mega.train.loop import Feed, Outcome
from solar_mega.train.stage import Prepared, Running, Stage, prepare_model, prepare_together, run_stage


def pretrain(cfg: PretrainConfig) -> Outcome:
    """Train as `cfg` says; every rank of the world calls this.

    Raises UserError for bad input, before any work, and when the loss is no longer finite.
    """
    prepared = prepare_together(cfg, lambda world: prepare(cfg, world), lambda seen: seen.resume_from)
    with ranks.running(cfg.parallel, cfg.train.seed, cfg.train.threads):
        from solar_mega.train.step import NEXT_TOKEN

        return run_stage(
            cfg, prepared, Stage("pretrain", NEXT_TOKEN, feed=lambda running: _feed(cfg, prepared, running))
        )


def prepare(cfg: PretrainConfig, world: int) -> Prepared:
    """Everything that can be checked without weights or process groups, checked."""
    check_pretrain(cfg, world)
    prepared = prepare_model(cfg, cfg.data.tokenizer)
    check_corpora(
        cfg.data,
        cfg.train.seq_length,
        validation=cfg.train.eval_samples > 0,
        vocab_size=prepared.arch.vocab_size,
        eos_id=prepared.tokenizer.eos_id,
        fingerprint=prepared.tokenizer.fingerprint,
    )
    return prepared


def _feed(cfg: PretrainConfig, prepared: Prepared, running: Running) -> Feed:
    from solar_mega.data.batches import Batches
    from solar_mega.data.datasets import build_datasets
    from solar_mega.data.locate import locate

    run, batch, dp, dp_rank = cfg.train, cfg.train.global_batch_size, running.dp, running.dp_rank
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
    training = Batches(train_set, running.first_step * batch, run.micro_batch_size, dp_rank, dp, batch)

    def validation():
        return iter(Batches(valid_set, 0, run.micro_batch_size, dp_rank, dp, run.eval_samples))

    return Feed(
        train=iter(training),
        validation=validation if run.eval_samples else None,
        train_micro_batches=batch // (run.micro_batch_size * dp),
        validation_micro_batches=run.eval_samples // (run.micro_batch_size * dp),
        wait_seconds=lambda: training.wait_seconds,
        locate=lambda sample: locate(train_set, sample),
    )
