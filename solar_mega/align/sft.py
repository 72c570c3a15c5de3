"""`solar-mega sft`: instruction tuning on packed conversations (paper, section 3.2).

The loss is the mean over all tokens the assistant says in the global batch, however it is cut.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from solar_mega.align.best import BestExport
from solar_mega.align.sft_tokenizer import check_same_vocabulary, write_tokenizer
from solar_mega.checkpoint.run_state import read_run_state
from solar_mega.checkpoint.source import open_source
from solar_mega.config.sft import SFTConfig, check_sft
from solar_mega.data.chat import ChatTemplate, load_template
from solar_mega.data.instruction_tokens import TokenizedSet, TokenOptions, tokenized
from solar_mega.data.instructions import specs_of
from solar_mega.data.packing import PackedRows, RowFeed
from solar_mega.data.tokenizer import Tokenizer, load_tokenizer
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say
from solar_mega.train import stage as stages
from solar_mega.train.loop import Feed, Outcome
from solar_mega.train.stage import Prepared, Running, Stage, prepare_model, prepare_together, run_stage


@dataclass(frozen=True)
class SFTData:
    """The conversations of a run, tokenised."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train: TokenizedSet
    valid: TokenizedSet | None
    rows: PackedRows
    valid_rows: list[list[int]]
    """One pass over `valid`, in its order."""

    @property
    def tokens_per_row(self) -> float:
        return self.train.tokens / self.rows.rows_in(1)

    def describe(self) -> str:
        """What became of the rows, for the console."""
        packed = self.rows.rows_in(1)
        lines = [
            f"data      {len(self.train):,} conversations in {packed:,} rows per pass, {self.template.name}"
        ]
        lines += [f"          {line}" for line in self.train.report.splitlines()]
        if self.valid is not None:
            lines.append(f"held out  {len(self.valid):,} conversations, {len(self.valid_rows):,} rows")
            lines += [f"          {line}" for line in self.valid.report.splitlines()]
        return "\n".join(lines)


def sft(cfg: SFTConfig) -> Outcome:
    """Train as `cfg` says; every rank of the world calls this.

    Raises UserError for bad input, before any work, and when the loss is no longer finite.
    """
    # One rank reads and tokenises; then all map its files.
    prepare_together(cfg, lambda _: read_data(cfg) if ranks.is_main() else None, lambda _: None)
    resolved, data, prepared = prepare_together(
        cfg, lambda world: prepare(cfg, world), lambda seen: seen[2].resume_from
    )
    with ranks.running(resolved.parallel, resolved.train.seed, resolved.train.threads):
        with ranks.together():
            side_files = resolved.output.dir / "tokenizer"
            if ranks.is_main():
                write_tokenizer(
                    side_files, prepared.source, resolved.data.tokenizer, data.template, data.tokenizer
                )
        say(data.describe())
        return run_stage(resolved, prepared, _stage(resolved, prepared, data, side_files))


def prepare(cfg: SFTConfig, world: int, cache: Path | None = None) -> tuple[SFTConfig, SFTData, Prepared]:
    """The configuration with its steps counted, the data, and everything that can be checked, checked."""
    data = read_data(cfg, cache)
    resolved = resolve(cfg, data.rows)
    check_sft(resolved, world)
    prepared = prepare_model(resolved, resolved.data.tokenizer)
    if prepared.resume_from is not None:
        _check_same_data(prepared.resume_from, data, resolved)
    return resolved, data, prepared


def _check_same_data(checkpoint: Path, data: SFTData, cfg: SFTConfig) -> None:
    """The rows a run has consumed are known by their number alone."""
    recorded = read_run_state(checkpoint).lineage.get("data", {})
    packed = recorded.get("packing", cfg.data.packing) == cfg.data.packing
    if recorded.get("fingerprint", data.train.fingerprint) != data.train.fingerprint or not packed:
        raise UserError(
            f"cannot resume from {checkpoint}: it was trained on other rows. The data sets, data.template, "
            "data.tokenizer, data.packing, data.overlong, train.seq_length and train.seed must be what they "
            "were; set them back, or give the new run its own output.dir"
        )


def read_data(cfg: SFTConfig, cache: Path | None = None) -> SFTData:
    """Reads and tokenises what `cfg` names, or maps what was tokenised before."""
    specs, valid_specs = specs_of(cfg.data.train, cfg.data.valid)
    source = open_source(cfg.model.path)
    tokenizer = load_tokenizer(cfg.data.tokenizer or source.side_files)
    if cfg.data.tokenizer is not None:
        check_same_vocabulary(tokenizer, source.side_files)
    template = load_template(cfg.data.template, tokenizer)
    options = token_options(cfg)
    cache = cache or cfg.data.cache or cfg.output.dir / "data_cache"
    train = tokenized(specs, template, tokenizer, options, cache)
    valid = tokenized(valid_specs, template, tokenizer, options, cache) if valid_specs else None
    rows = PackedRows(train.lengths, cfg.train.seq_length, cfg.train.seed, together=cfg.data.packing)
    return SFTData(tokenizer, template, train, valid, rows, _one_pass(cfg, valid))


def token_options(cfg: SFTConfig) -> TokenOptions:
    return TokenOptions(cfg.train.seq_length, cfg.data.overlong, cfg.train.seed, cfg.data.strict)


def _one_pass(cfg: SFTConfig, valid: TokenizedSet | None) -> list[list[int]]:
    if valid is None:
        return []
    packed = PackedRows(valid.lengths, cfg.train.seq_length, None, together=cfg.data.packing)
    count = packed.rows_in(1)
    return [packed[row] for row in range(min(count, cfg.train.eval_samples or count))]


def resolve(cfg: SFTConfig, rows: PackedRows) -> SFTConfig:
    """`cfg` with the steps that `data.epochs` passes take, the last batch filled from the next pass, and the
    warm-up they make."""
    train, schedule = cfg.train, cfg.schedule
    if train.steps == 0:
        steps = max(1, math.ceil(rows.rows_in(cfg.data.epochs) / max(1, train.global_batch_size)))
        train = dataclasses.replace(train, steps=steps)
    if schedule.warmup_steps == 0 and schedule.warmup_fraction > 0:
        warmup = min(round(schedule.warmup_fraction * train.steps), train.steps - 1)
        schedule = dataclasses.replace(schedule, warmup_steps=warmup)
    return dataclasses.replace(cfg, train=train, schedule=schedule)


def describe(cfg: SFTConfig, data: SFTData, prepared: Prepared) -> str:
    """What the run will train, on what, for how long."""
    return f"{stages.describe(cfg, prepared, cfg.parallel.dp or 1)}\n{data.describe()}"


def _stage(cfg: SFTConfig, prepared: Prepared, data: SFTData, side_files: Path) -> Stage:
    from solar_mega.align.neftune import noisy_embeddings
    from solar_mega.train.step import Objective, next_token_loss

    def forward(chunk, batch):
        with noisy_embeddings(chunk, batch, cfg.data.neftune_alpha, cfg.train.seed):
            return next_token_loss(chunk, batch)

    lineage = {
        "data": {
            "train": list(cfg.data.train),
            "fingerprint": data.train.fingerprint,
            "packing": cfg.data.packing,
            "conversations": len(data.train),
            "tokens_per_pass": data.train.tokens,
            "template": cfg.data.template,
            "template_fingerprint": data.template.fingerprint,
        }
    }
    return Stage(
        "sft",
        Objective(forward),
        feed=lambda running: _feed(cfg, prepared, data, side_files, running),
        lineage=lineage,
        tokens_per_sample=data.tokens_per_row,
        side_files=side_files,
    )


def _feed(cfg: SFTConfig, prepared: Prepared, data: SFTData, side_files: Path, running: Running) -> Feed:
    run, dp = cfg.train, running.dp
    common = {
        "dp_rank": running.dp_rank,
        "dp_size": dp,
        "seq_length": run.seq_length,
        "pad_id": data.tokenizer.eos_id,
    }
    first_row = running.first_step * run.global_batch_size
    training = RowFeed(data.rows, data.train, first_row=first_row, **common)
    # Every rank takes as many micro-batches; an interleaved pipeline wants a multiple of its stages.
    share = math.ceil(len(data.valid_rows) / dp)
    group = cfg.parallel.pp if cfg.parallel.vpp > 1 else 1

    def validation():
        return iter(RowFeed(data.valid_rows, data.valid, first_row=0, **common))

    best = BestExport(cfg, prepared, running.trainer.chunks, side_files) if cfg.output.export_best else None
    return Feed(
        train=iter(training),
        validation=validation if data.valid is not None else None,
        train_micro_batches=run.global_batch_size // dp,
        validation_micro_batches=math.ceil(share / group) * group,
        wait_seconds=lambda: training.wait_seconds,
        validated=best,
    )
