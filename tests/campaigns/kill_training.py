"""Kill a training again and again at random moments, and see what it loses.

    python -m tests.campaigns.kill_training --kills 30 --saves async --layout dp2 --out result.json

Every attempt is a set of real processes, one per rank, that run `solar-mega pretrain` and get SIGKILL: one
rank, or all of them, at a random moment - while they start, load, step, validate, save or export. They are
forked from a parent that has imported everything and done nothing, so that a restart takes a second instead
of ten. Checked after every kill:

- a complete checkpoint is there (files, sizes, hashes), unless the run had not come to its first save
- no more than one save interval is lost; with saves in the background, and only while one is being written,
  the interval before it as well
- ranks that were not killed end by themselves

and after every finished run: weights and losses equal those of a run that nobody touched, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

STEPS, INTERVAL = 160, 8
LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "pp2": (2, "--parallel.pp 2"),
    "tp2": (2, "--parallel.tp 2"),
    "tp2dp2": (4, "--parallel.tp 2"),
    "pp2dp2": (4, "--parallel.pp 2"),
}


@dataclass
class Kill:
    victims: str
    """`all`, or the number of the one rank that was killed."""
    after_seconds: float
    """Since the attempt's start."""
    step: int
    """Last step in metrics.jsonl."""
    during_save: bool
    """An unfinished checkpoint lay in the directory."""
    resumes_at: int
    """Step of the newest complete checkpoint; 0 starts anew."""
    others_ended_after: float | None
    """Seconds until the ranks that were not killed had ended by themselves; None where there were none, or
    they had not met the killed one yet."""


@dataclass
class Campaign:
    root: Path
    layout: str
    saves: str
    kills: list[Kill] = field(default_factory=list)
    finished: int = 0
    attempts: int = 0

    @property
    def world(self) -> int:
        return LAYOUTS[self.layout][0]

    def words(self, run: Path, steps: int = STEPS) -> list[str]:
        inputs = self.root / "inputs"
        settings = f"""--model.path {inputs}/model --data.train {inputs}/train --data.valid {inputs}/valid
            --output.dir {run} --train.steps {steps} --train.seq_length 32 --train.global_batch_size 4
            --train.micro_batch_size 1 --train.precision fp32 --train.eval_interval 25 --train.eval_samples 4
            --train.threads 1 --optimizer.lr 1e-3 --schedule.warmup_steps 2
            --checkpoint.interval {INTERVAL} --checkpoint.async_save {str(self.saves == "async").lower()}
            --data.cache {self.root}/data_cache {LAYOUTS[self.layout][1]}"""
        return ["pretrain", *settings.split()]


def start(words: list[str], world: int, log: Path) -> list[int]:
    """Process ids of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(words, {"RANK": r, "LOCAL_RANK": r}, world, port, log) for r in range(world)]


def _fork(words: list[str], place: dict[str, int], world: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        settings = {**place, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in settings.items()}, MASTER_ADDR="127.0.0.1")
        from solar_mega.__main__ import main

        code = main(words)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pids: list[int], seconds: float) -> tuple[dict[int, int], float]:
    """Exit codes by process id (negative: killed by that signal), and when the last one ended."""
    codes: dict[int, int] = {}
    began = time.monotonic()
    while True:
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if len(codes) == len(pids) or time.monotonic() - began >= seconds:
            break
        time.sleep(0.01)
    return codes, time.monotonic() - began


def kill(campaign: Campaign, run: Path, dice: random.Random, log: Path) -> None:
    """One attempt, killed at a random moment; it may finish before that."""
    from solar_mega.checkpoint.resume import newest_whole
    from solar_mega.checkpoint.run_state import check_hashes
    from solar_mega.checkpoint.store import CheckpointStore

    campaign.attempts += 1
    written = log.stat().st_size if log.exists() else 0
    pids = start(campaign.words(run), campaign.world, log)
    delay = dice.uniform(0.2, dice.choice((2.5, 8.0)))
    codes, _ = wait(pids, delay)
    if len(codes) == len(pids):
        assert set(codes.values()) == {0}, f"exit codes {codes}; see {log}"
        return
    assert not codes, f"a rank ended by itself: {codes}; see {log}"
    if dice.random() < 0.5:
        _into_a_save(run, dice)
    codes, _ = wait(pids, 0)
    if codes:
        later, _ = wait([pid for pid in pids if pid not in codes], 60)
        assert set({**codes, **later}.values()) == {0}, f"exit codes {codes} {later}; see {log}"
        return
    victims = pids if dice.random() < 0.5 else [dice.choice(pids)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    partial = any((run / "checkpoints").glob(".step-*.partial"))
    survivors = [pid for pid in pids if pid not in victims]
    wait(victims, 60)
    ended, took = wait(survivors, 30)
    if len(ended) < len(survivors):
        # Ranks that were still to meet the killed one wait for it; ending them is the launcher's part.
        assert "layout    tp" not in log.read_bytes()[written:].decode(), (
            f"ranks still there after 30 s; see {log}"
        )
        for pid in survivors:
            if pid not in ended:
                os.kill(pid, signal.SIGKILL)
        wait(survivors, 60)
        survivors = []
    assert 0 not in ended.values() or _last_step(run) == STEPS, f"exit codes {ended}; see {log}"
    store = CheckpointStore(run / "checkpoints")
    latest = newest_whole(store, fallback=False)
    if latest is not None:
        check_hashes(latest)
    resumes_at = 0 if latest is None else int(latest.name[5:])
    step = _last_step(run)
    lost = step - resumes_at
    allowed = INTERVAL * (2 if campaign.saves == "async" else 1) + 1
    assert lost <= allowed, f"step {step}, resumes at {resumes_at}; see {log}"
    name = "all" if len(victims) == len(pids) and len(pids) > 1 else str(pids.index(victims[0]))
    campaign.kills.append(
        Kill(name, round(delay, 2), step, partial, resumes_at, round(took, 2) if survivors else None)
    )


def _into_a_save(run: Path, dice: random.Random) -> None:
    """Waits for the next save to begin, and a random moment longer. A run that ends meanwhile is left to
    the caller."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not any((run / "checkpoints").glob(".step-*.partial")):
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.15))


def _last_step(run: Path) -> int:
    from solar_mega.runtime.metrics import read_metrics

    file = run / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(file)), default=0) if file.is_file() else 0


def content(run: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Exported weights, and all losses."""
    from solar_mega.runtime.metrics import read_metrics

    weights = {file.name: file.read_bytes() for file in sorted((run / "hf").glob("*.safetensors"))}
    kept = ("step", "loss", "grad_norm", "lr", "val_loss")
    rows = read_metrics(run / "metrics.jsonl")
    return weights, [{key: row[key] for key in kept if key in row} for row in rows]


def prepare(root: Path) -> None:
    """A tiny model, its tokenizer and two corpora, made in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from tests.train.conftest import make_inputs

            make_inputs(root / "inputs", Path(sysconfig.get_paths()["stdlib"]))
            code = 0
        finally:
            os._exit(code)
    codes, _ = wait([pid], 120)
    assert codes == {pid: 0}, codes


def warm_up() -> None:
    """Everything a rank imports; nothing that starts a thread."""
    import warnings

    warnings.simplefilter("ignore")
    import transformers  # noqa: F401

    import solar_mega.checkpoint.megatron
    import solar_mega.checkpoint.to_hf
    import solar_mega.data.datasets
    import solar_mega.model.builder
    import solar_mega.train.optimizer
    import solar_mega.train.pretrain
    import solar_mega.train.saves
    import solar_mega.train.step  # noqa: F401


def run_campaign(campaign: Campaign, kills: int, seed: int, deadline: float) -> dict:
    dice, log = random.Random(seed), campaign.root / "log.txt"
    warm_up()
    prepare(campaign.root)
    reference = campaign.root / "reference"
    codes, seconds = wait(start(campaign.words(reference), campaign.world, log), 300)
    assert set(codes.values()) == {0} and len(codes) == campaign.world, f"{codes}; see {log}"
    expected = content(reference)
    assert expected[0] and len(expected[1]) >= STEPS
    began = time.monotonic()
    while len(campaign.kills) < kills and time.monotonic() < deadline:
        run = campaign.root / f"run-{campaign.finished}"
        while len(campaign.kills) < kills and time.monotonic() < deadline and not (run / "hf").exists():
            kill(campaign, run, dice, log)
        campaign.attempts += 1
        codes, _ = wait(start(campaign.words(run), campaign.world, log), 300)
        assert set(codes.values()) == {0} and len(codes) == campaign.world, f"{codes}; see {log}"
        weights, losses = content(run)
        assert weights == expected[0], f"{run}: other weights than the untouched run"
        assert losses == expected[1], f"{run}: other losses than the untouched run"
        campaign.finished += 1
        shutil.rmtree(run)
    return report(campaign, seconds, time.monotonic() - began)


def report(campaign: Campaign, reference_seconds: float, seconds: float) -> dict:
    kills = campaign.kills
    lost = [kill.step - kill.resumes_at for kill in kills]
    waits = [kill.others_ended_after for kill in kills if kill.others_ended_after is not None]
    return {
        "layout": campaign.layout,
        "ranks": campaign.world,
        "saves": campaign.saves,
        "steps_per_run": STEPS,
        "save_interval": INTERVAL,
        "kills": len(kills),
        "kills_during_a_save": sum(kill.during_save for kill in kills),
        "kills_of_one_rank": len(waits),
        "kills_before_the_first_checkpoint": sum(kill.resumes_at == 0 for kill in kills),
        "runs_finished_bit_for_bit_equal": campaign.finished,
        "most_steps_lost": max(lost, default=0),
        "kills_that_lost_more_than_an_interval": sum(steps > INTERVAL for steps in lost),
        "longest_seconds_until_other_ranks_had_ended": max(waits, default=0.0),
        "seconds_of_the_untouched_run": round(reference_seconds, 1),
        "seconds": round(seconds, 1),
        "each": [vars(kill) for kill in kills],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--saves", choices=("sync", "async"), default="sync")
    parser.add_argument("--layout", choices=LAYOUTS, default="dp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no attempt after that many")
    parser.add_argument("--root", type=Path, required=True, help="an empty directory to work in")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options.root.resolve(), options.layout, options.saves)
    result = run_campaign(campaign, options.kills, options.seed, time.monotonic() + options.seconds)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "each"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
