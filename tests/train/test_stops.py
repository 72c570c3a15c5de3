"""Runs that are stopped or cannot save: signals at any moment, a disk that fills up, kills."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solar_mega.__main__ import main
from tests.distributed import ROOT
from tests.train.test_pretrain import ENVIRONMENT, exported_bytes, history

SLOW = """
import os, signal, sys
from solar_mega.__main__ import main
import solar_mega.train.step as step

seen = {"where": sys.argv[1], "count": 0}

def strike():
    seen["count"] += 1
    if seen["count"] == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

if seen["where"] == "save":
    import solar_mega.checkpoint.writing as writing, solar_mega.checkpoint.saver as saver
    whole = saver.write_buckets
    def write(*arguments):
        strike()
        return whole(*arguments)
    saver.write_buckets = write
else:
    name = {"step": "step", "validation": "evaluate"}[seen["where"]]
    whole = getattr(step.Trainer, name)
    def method(self, *arguments):
        strike()
        return whole(self, *arguments)
    setattr(step.Trainer, name, method)
sys.exit(main(sys.argv[3:]))
"""
"""The verb, with a signal sent to itself when the third step, validation or save begins."""

SETTINGS = "--checkpoint.interval 2 --train.eval_interval 2 --train.steps 12"


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("stops") / "undisturbed"
    assert main(inputs.words(run, SETTINGS)) == 0
    return run


@pytest.mark.parametrize(
    ("where", "name"), [("step", "SIGTERM"), ("validation", "SIGUSR1"), ("save", "SIGTERM")]
)
def test_a_signal_at_any_moment_saves_and_loses_nothing(inputs, undisturbed, tmp_path, where, name):
    run, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(SLOW)
    words = inputs.words(run, SETTINGS)
    command = [sys.executable, str(script), where, name, *words]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75, done.stdout + done.stderr
    assert f"{name}: saved at step" in done.stdout
    last = history(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"  # nothing was lost
    assert main(words) == 0
    assert history(run) == history(undisturbed)
    assert exported_bytes(run) == exported_bytes(undisturbed)


@pytest.mark.parametrize("saves", ["false", "true"], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_stops_the_run_or_not_as_configured(inputs, tmp_path, capfd, saves, policy):
    """No file may grow beyond a size that only tensors exceed; the first checkpoint was there before."""
    run = tmp_path / "run"
    settings = f"--schedule.warmup_steps 0 --checkpoint.async_save {saves} --checkpoint.on_failure {policy}"
    assert main(inputs.words(run, settings, "--train.steps 2")) == 0
    before = {file.name: file.read_bytes() for file in (run / "checkpoints" / "step-00000002").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        code = main(inputs.words(run, settings, "--checkpoint.interval 1 --train.steps 5"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    said = capfd.readouterr()
    assert code == 2 and "would be larger" in said.err and "older ones are untouched" in said.err
    steps = [row["step"] for row in history(run) if "loss" in row]
    # Continuing, only the last save, which nothing can follow, is fatal. In the background a failure shows a
    # little later.
    assert steps[-1] == 5 if policy == "continue" else steps[-1] in ((3,) if saves == "false" else (3, 4, 5))
    assert ("the run goes on without this checkpoint" in said.out) == (policy == "continue")
    after = {file.name: file.read_bytes() for file in (run / "checkpoints" / "step-00000002").iterdir()}
    assert after == before and (run / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert main(inputs.words(run, settings, "--train.steps 5")) == 0


def test_damage_is_found_and_set_aside_only_when_told_to(inputs, undisturbed, tmp_path, capfd):
    import shutil

    from tests.checkpoint.test_saver import flip

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = run / "checkpoints" / "step-00000012"
    flip(newest / "__0_0.distcp")
    assert main(inputs.words(run, SETTINGS)) == 2
    error = capfd.readouterr().err
    assert "__0_0.distcp does not hold what was written" in error and "checkpoint.fallback = true" in error
    assert main(inputs.words(run, SETTINGS, "--checkpoint.fallback true")) == 0
    assert "set aside" in capfd.readouterr().out
    assert history(run) == history(undisturbed) and exported_bytes(run) == exported_bytes(undisturbed)
    assert (run / "checkpoints" / "step-00000012.damaged").is_dir()


@pytest.mark.parametrize("saves", ["sync", "async"])
def test_killed_and_restarted_a_run_ends_the_same(saves, tmp_path):
    """Three kills of the campaign in tests/campaigns."""
    out = tmp_path / "result.json"
    words = f"--kills 3 --saves {saves} --layout dp2 --root {tmp_path}/root --out {out} --seed {len(saves)}"
    command = [sys.executable, "-m", "tests.campaigns.kill_training", *words.split()]
    began = time.monotonic()
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads(out.read_text())
    assert result["kills"] == 3 and result["runs_finished_bit_for_bit_equal"] >= 1
    assert time.monotonic() > began


def test_traces_and_memory(inputs, tmp_path):
    run = tmp_path / "run"
    code = main(inputs.words(run, "--train.profile 2 3 --output.export_hf false --train.steps 4"))
    assert code == 0
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "rank-0000-steps-2-3.json.gz" and trace.stat().st_size > 1000
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["memory_bytes"] > 10**7 for row in rows if "loss" in row)
    assert Path(run / "hangs").exists() is False and os.environ.get("RANK") is None
