"""sDPO: DPO in rungs, each starting policy and reference from the result of the one before.

    model ── rung-1 ── hf ── rung-2 ── hf ── ... ── hf          policy and reference of rung t+1: result of t
              chunk 1         chunk 2

The reference rises with the policy: it is better aligned on every rung, and so a stricter lower bound (Kim et
al., "sDPO: Don't Use Your Data All at Once", arXiv 2403.19270; SOLAR 10.7B, section 3.2). That paper also
orders chunks from easy to hard, by how often the first reference already prefers the chosen response.

`ladder.json` keeps the order and how far the ladder is climbed; an interrupted rung resumes as any run does.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from solar_mega.align.dpo import describe_run, dpo, reference_accuracy
from solar_mega.align.pairs import datasets_of, specs_of
from solar_mega.artifact.lineage import LINEAGE
from solar_mega.config.dpo import DPOConfig
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import is_main, say
from solar_mega.runtime.files import atomic_file
from solar_mega.train.loop import Outcome

STATE = "ladder.json"


@dataclass(frozen=True)
class LadderState:
    """What `ladder.json` says."""

    chunks: tuple[str, ...]
    """As configured."""
    order: tuple[int, ...]
    """Chunk of each rung."""
    accuracies: tuple[float, ...] | None
    """Of each chunk, by the first reference; None where the order was given."""
    finished: int = 0
    """Rungs done."""


def climb(cfg: DPOConfig) -> Outcome:
    """All rungs that are not done yet; every rank of the world calls this. The last rung's model is also
    `<output.dir>/hf`.

    Raises UserError for bad input, and when the directory holds another ladder.
    """
    check_ladder(cfg)
    state = read_state(cfg) or _decided(cfg)
    outcome = Outcome(0, None)
    for rung, chunk in enumerate(state.order):
        if rung < state.finished:
            say(f"rung {rung + 1}: done before, {rung_directory(cfg, rung)}")
            continue
        say(f"rung {rung + 1} of {len(state.order)}: {cfg.ladder.chunks[chunk]}")
        lineage = {"rung": rung + 1, "rungs": len(state.order), "chunk": cfg.ladder.chunks[chunk]}
        outcome = dpo(rung_config(cfg, rung, chunk), lineage)
        if outcome.stopped_by:
            return outcome
        state = replace(state, finished=rung + 1)
        _write_state(cfg, state)
    _point_at_last(cfg, len(state.order))
    return outcome


def check_ladder(cfg: DPOConfig) -> None:
    """What only a ladder asks of its configuration. Raises UserError listing all of it."""
    problems = Problems()
    if cfg.data.train:
        problems.add("data.train and ladder.chunks: give one of them; given: both")
    if not cfg.output.export_hf:
        problems.add("output.export_hf = false: each rung starts from the exported model of the one before")
    if len(set(cfg.ladder.chunks)) < len(cfg.ladder.chunks):
        problems.add("ladder.chunks: a chunk is given twice")
    if cfg.loss.reference_free and cfg.ladder.order != "given":
        problems.add('ladder.order = "easy_to_hard" asks the reference, which loss.reference_free turns off')
    if cfg.checkpoint.resume == "never" and (cfg.output.dir / STATE).exists():
        problems.add(
            f'output.dir = {str(cfg.output.dir)!r} already holds a ladder and checkpoint.resume = "never"'
        )
    problems.raise_if_any("ladder")
    specs_of(cfg)


def rung_directory(cfg: DPOConfig, rung: int) -> Path:
    return cfg.output.dir / f"rung-{rung + 1}"


def rung_config(cfg: DPOConfig, rung: int, chunk: int) -> DPOConfig:
    """The DPO step of a rung, counted from 0."""
    model = cfg.model
    if rung:
        # Depth and random weights are the first rung's affair.
        path = rung_directory(cfg, rung - 1) / "hf"
        model = replace(model, path=path, layer_map="identity", weights="pretrained")
    return replace(
        cfg,
        model=model,
        output=replace(cfg.output, dir=rung_directory(cfg, rung)),
        data=replace(
            cfg.data,
            train=datasets_of(cfg.ladder.chunks[chunk]),
            cache=cfg.data.cache or cfg.output.dir / "reference",
        ),
        ladder=replace(cfg.ladder, chunks=(), order="given"),
    )


def read_state(cfg: DPOConfig) -> LadderState | None:
    """Raises UserError when the file is damaged or of another ladder, or the last rung done is gone."""
    file = cfg.output.dir / STATE
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        accuracies = content["accuracies"]
        state = LadderState(
            tuple(content["chunks"]),
            tuple(content["order"]),
            None if accuracies is None else tuple(accuracies),
            int(content["finished"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}; remove it to start the ladder again") from None
    if state.chunks != cfg.ladder.chunks:
        raise UserError(
            f"{file} is of a ladder on other chunks: {'; '.join(state.chunks)}. Set ladder.chunks back, or "
            "give the new ladder its own output.dir"
        )
    for rung in range(state.finished):
        if not (rung_directory(cfg, rung) / "hf" / LINEAGE).exists() and rung == state.finished - 1:
            raise UserError(
                f"{file} says rung {rung + 1} is done, but {rung_directory(cfg, rung)}/hf is gone"
            )
    return state


def _decided(cfg: DPOConfig) -> LadderState:
    accuracies, order = None, tuple(range(len(cfg.ladder.chunks)))
    if cfg.ladder.order == "easy_to_hard":
        accuracies = tuple(reference_accuracy(_first_look(cfg, chunk)) for chunk in order)
        order = easy_to_hard(accuracies)
        for place, chunk in enumerate(order, 1):
            text = f"the reference prefers {accuracies[chunk]:.1%} of the chosen responses"
            say(f"rung {place}: {text}: {cfg.ladder.chunks[chunk]}")
    state = LadderState(cfg.ladder.chunks, order, accuracies)
    _write_state(cfg, state)
    return state


def easy_to_hard(accuracies: Sequence[float]) -> tuple[int, ...]:
    """Chunks by falling reward accuracy of the reference; ties as given."""
    return tuple(sorted(range(len(accuracies)), key=lambda chunk: -accuracies[chunk]))


def _first_look(cfg: DPOConfig, chunk: int) -> DPOConfig:
    """The first rung's step on `chunk`, without held-out pairs."""
    looked = rung_config(cfg, 0, chunk)
    return replace(looked, data=replace(looked.data, valid=()))


def _write_state(cfg: DPOConfig, state: LadderState) -> None:
    if is_main():
        with atomic_file(cfg.output.dir / STATE) as stream:
            stream.write(json.dumps(asdict(state), indent=1) + "\n")


def _point_at_last(cfg: DPOConfig, rungs: int) -> None:
    if not is_main():
        return
    link, target = cfg.output.dir / "hf", Path(rung_directory(cfg, rungs - 1).name) / "hf"
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    fresh = cfg.output.dir / ".hf.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    say(f"ladder done: {link} -> {target}")


def describe(cfg: DPOConfig) -> str:
    """The rungs in the order given, with what is known of their data, for `--dry-run`."""
    check_ladder(cfg)
    lines = []
    for rung in range(len(cfg.ladder.chunks)):
        looked = rung_config(cfg, 0, rung)
        lines += [f"chunk {rung + 1}: {cfg.ladder.chunks[rung]}", describe_run(looked)]
    return "\n".join([*lines, f"order: {cfg.ladder.order}"])
