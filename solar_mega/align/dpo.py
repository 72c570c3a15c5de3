"""One DPO step: pairs, the reference's log-probs, training, export.

- prepare:   configuration and model checked; no process group yet
- pairs:     read and tokenised by rank 0 for all; now the number of steps is known
- reference: the policy's initial weights over all pairs, or the cache (align.reference)
- train:     the shared loop, after a look at the first batch: policy = reference, so the loss is ln 2
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solar_mega.align.pairs import PairData, PairSet, read_data, specs_of
from solar_mega.align.reference import ReferenceCache, ReferenceKey, reference_logps
from solar_mega.align.sft_tokenizer import check_same_vocabulary, write_tokenizer
from solar_mega.artifact.lineage import directory_hash
from solar_mega.checkpoint.run_state import read_run_state
from solar_mega.config.dpo import DPOConfig, check_dpo
from solar_mega.data.chat import ChatTemplate, load_template
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say
from solar_mega.train.loop import Feed, Outcome
from solar_mega.train.stage import Prepared, Running, Stage, prepare_model, prepare_together, run_stage

if TYPE_CHECKING:
    from torch.nn import Module

    from solar_mega.align.pair_batches import Loader, RowPlan

LN2_TOLERANCE = 1e-3
"""Of the mean loss, and of the mean margin from 0, before the first update."""

_UNKNOWN_STEPS = 2**31 - 1


@dataclass(frozen=True)
class PreparedDPO:
    model: Prepared
    template: ChatTemplate


def dpo(cfg: DPOConfig, lineage: Mapping[str, Any] | None = None) -> Outcome:
    """One DPO step as `cfg` says, on `data.train`; every rank of the world calls this. `lineage` is added to
    the result's.

    Raises UserError for bad input, before any work; when the first loss is not that of a policy equal to its
    reference; and when the loss is no longer finite.
    """
    prepared = prepare_together(cfg, lambda world: prepare(cfg, world), lambda seen: seen.model.resume_from)
    with ranks.running(cfg.parallel, cfg.train.seed, cfg.train.threads):
        data = read_together(cfg, prepared)
        say(data.train.report + (f"\nheld out\n{data.valid.report}" if data.valid else ""))
        with ranks.together():
            cfg = with_steps(cfg, len(data.train))
            check_dpo(cfg, ranks.world_size())
            prepared = replace(prepared, model=prepare_model(cfg, cfg.data.tokenizer))
            if prepared.model.resume_from is not None:
                _check_same_pairs(prepared.model.resume_from, data.train)
            side_files = cfg.output.dir / "tokenizer"
            if ranks.is_main():
                model = prepared.model
                given = cfg.data.tokenizer
                write_tokenizer(side_files, model.source, given, prepared.template, model.tokenizer)
        return _train(cfg, prepared, data, side_files, dict(lineage or {}))


def prepare(cfg: DPOConfig, world: int) -> PreparedDPO:
    """Everything that can be checked without reading the pairs, checked."""
    provisional = cfg if cfg.train.steps else replace(cfg, train=replace(cfg.train, steps=_UNKNOWN_STEPS))
    check_dpo(provisional, world)
    specs_of(cfg)
    model = prepare_model(provisional, cfg.data.tokenizer)
    if cfg.data.tokenizer is not None:
        check_same_vocabulary(model.tokenizer, model.source.side_files)
    return PreparedDPO(model, load_template(cfg.data.template, model.tokenizer))


def read_together(cfg: DPOConfig, prepared: PreparedDPO) -> PairData:
    """Rank 0 reads and tokenises for all. Collective."""
    import torch.distributed as dist

    data: list[Any] = [None]
    with ranks.together():
        if ranks.is_main():
            data[0] = read_data(cfg, prepared.template, prepared.model.tokenizer)
    dist.broadcast_object_list(data, 0, group=ranks.control_group())
    return data[0]


def with_steps(cfg: DPOConfig, pairs: int) -> DPOConfig:
    """`train.steps` and `schedule.warmup_steps` as numbers, where they were left to the data."""
    steps = cfg.train.steps or max(1, round(cfg.data.epochs * pairs / cfg.train.global_batch_size))
    warmup = cfg.schedule.warmup_steps or math.floor(cfg.schedule.warmup_fraction * steps)
    return replace(
        cfg,
        train=replace(cfg.train, steps=steps),
        schedule=replace(cfg.schedule, warmup_steps=warmup, warmup_fraction=0.0),
    )


def reference_accuracy(cfg: DPOConfig) -> float:
    """Share of the pairs of `data.train` whose chosen response the model finds likelier than the rejected one
    (sDPO's reward accuracy of a reference). Its log-probs stay in the cache. Every rank calls this."""
    prepared = prepare_together(cfg, lambda world: prepare(cfg, world), lambda seen: None)
    with ranks.running(cfg.parallel, cfg.train.seed, cfg.train.threads):
        from solar_mega.model.builder import build_for_training
        from solar_mega.train.stage import load_initial_weights

        reference = _Reference(cfg, prepared, read_together(cfg, prepared))
        chunks = build_for_training(prepared.model.arch, cfg.parallel, cfg.train, cfg.kernels)
        load_initial_weights(cfg, prepared.model, chunks)
        reference.compute(chunks)
    chosen, rejected = reference.train.T
    return float((chosen > rejected).mean())


def _train(
    cfg: DPOConfig, prepared: PreparedDPO, data: PairData, side_files: Path, lineage: dict[str, Any]
) -> Outcome:
    from solar_mega.align.objective import dpo_objective

    reference = _Reference(cfg, prepared, data)
    stage = Stage(
        "dpo",
        dpo_objective(cfg.loss),
        feed=lambda running: _feed(cfg, data, reference, running),
        lineage={"data_hash": data.train.fingerprint, "template": cfg.data.template, **lineage},
        with_initial_weights=reference.compute,
        tokens_per_sample=data.train.tokens_per_pair,
        side_files=side_files,
    )
    return run_stage(cfg, prepared.model, stage)


@dataclass
class _Reference:
    """The reference's log-probs of training and held-out pairs, once the model is there."""

    cfg: DPOConfig
    prepared: PreparedDPO
    data: PairData
    train: np.ndarray | None = None
    valid: np.ndarray | None = None
    _checkpoint: str = field(default="")

    def compute(self, chunks: "Sequence[Module]") -> None:
        """Collective. `chunks` hold the weights that the run began with."""
        if self.cfg.loss.reference_free:
            return
        self.train = self._of(self.data.train, chunks, "reference log-probs")
        if self.data.valid is not None:
            self.valid = self._of(self.data.valid, chunks, "reference log-probs, held out")

    def _of(self, pairs: PairSet, chunks: "Sequence[Module]", label: str) -> np.ndarray:
        self._checkpoint = self._checkpoint or checkpoint_hash(self.cfg, self.prepared.model)
        key = reference_key(self.cfg, self.prepared, pairs, self._checkpoint)
        cache = ReferenceCache(cache_directory(self.cfg), key, len(pairs))
        return reference_logps(chunks, pairs.pairs, _plan(self.cfg), cache, label)


def cache_directory(cfg: DPOConfig) -> Path:
    return cfg.data.cache or cfg.output.dir / "reference"


def checkpoint_hash(cfg: DPOConfig, prepared: Prepared) -> str:
    """Of the weights a run starts from: the content of the source, and what is made of it. Collective."""
    content = None
    with ranks.together():
        if ranks.is_main():
            content = directory_hash(prepared.source.path)
    parts = [ranks.gather(content)[0], str(prepared.layer_map)]
    if cfg.model.weights == "random":
        parts += ["random", str(cfg.train.seed), str(cfg.model.init_std)]
    return " ".join(parts)


def reference_key(cfg: DPOConfig, prepared: PreparedDPO, pairs: PairSet, checkpoint: str) -> ReferenceKey:
    exact = cfg.train.precision == "fp32"
    layout = f"tp{cfg.parallel.tp} row{cfg.train.seq_length} {cfg.kernels.attention}"
    return ReferenceKey(
        checkpoint,
        pairs.fingerprint,
        prepared.template.fingerprint,
        cfg.train.precision,
        "" if exact else layout,
    )


def _plan(cfg: DPOConfig) -> "RowPlan":
    from megatron.core import parallel_state

    from solar_mega.align.pair_batches import RowPlan

    return RowPlan(
        length=cfg.train.seq_length,
        packing=cfg.data.packing,
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        multiple=cfg.parallel.pp if cfg.parallel.vpp > 1 else 1,
    )


def _feed(cfg: DPOConfig, data: PairData, reference: _Reference, running: Running) -> Feed:
    from solar_mega.align.pair_batches import Loader, Order, TrainingRows

    plan, alpha = _plan(cfg), (cfg.loss.rpo_alpha, cfg.loss.rpo_mean)
    loader = Loader(data.train.pairs, reference.train, plan, *alpha)
    order = Order(len(data.train), cfg.train.global_batch_size, cfg.train.seed)
    if running.first_step == 0 and not cfg.loss.reference_free:
        _check_start(cfg, loader, order.of_step(1), running)
    training = TrainingRows(loader, order, running.first_step)
    held_out, everything = None, []
    if data.valid is not None:
        held_out = Loader(data.valid.pairs, reference.valid, plan, *alpha)
        everything = list(range(len(data.valid)))
    return Feed(
        train=training,
        validation=(lambda: held_out.batches(everything)) if held_out is not None else None,
        train_micro_batches=training.micro_batches,
        validation_micro_batches=held_out.count(everything) if held_out is not None else 0,
        wait_seconds=lambda: training.wait_seconds,
    )


def _check_start(cfg: DPOConfig, loader: "Loader", numbers: Sequence[int], running: Running) -> None:
    """Policy and reference are the same model before the first update, and must look it. Collective."""
    from solar_mega.align.objective import loss_at_reference

    seen = running.trainer.evaluate(loader.batches(numbers), loader.count(numbers)).statistics
    loss, margin, expected = seen["loss/pairs"], seen["rewards/margins"], loss_at_reference(cfg.loss)
    say(f"before the first step: loss {loss:.6f} (policy = reference: {expected:.6f}), margin {margin:.1e}")
    if not (abs(loss - expected) <= LN2_TOLERANCE and abs(margin) <= LN2_TOLERANCE):
        raise UserError(
            f"before the first update the loss is {loss:.6f} and the margin {margin:.6f}; they must be "
            f"{expected:.6f} and 0 (within {LN2_TOLERANCE}), as policy and reference are the same model: the "
            f"log-probs in {cache_directory(cfg)} are not this model's. Delete that directory; if it happens "
            "again, the forward pass does not repeat itself"
        )


def _check_same_pairs(checkpoint: Path, pairs: PairSet) -> None:
    """The pairs a run has consumed are known by their number alone."""
    recorded = read_run_state(checkpoint).lineage.get("data_hash", pairs.fingerprint)
    if recorded != pairs.fingerprint:
        raise UserError(
            f"cannot resume from {checkpoint}: it was trained on other pairs. The data sets, data.template, "
            "data.tokenizer, data.max_length, data.max_prompt_length and what is left out must be what they "
            "were; set them back, or give the new run its own output.dir"
        )


def describe_run(cfg: DPOConfig) -> str:
    """What a run would do, for `--dry-run`: reads and tokenises the pairs, starts nothing."""
    from solar_mega.train.stage import describe

    world = cfg.parallel.tp * cfg.parallel.pp * (cfg.parallel.dp or 1)
    prepared = prepare(cfg, world)
    data = read_data(cfg, prepared.template, prepared.model.tokenizer)
    cfg = with_steps(cfg, len(data.train))
    check_dpo(cfg, world)
    held_out = [] if data.valid is None else ["held out", data.valid.report]
    return "\n".join([data.train.report, *held_out, describe(cfg, prepared.model, cfg.parallel.dp or 1)])
