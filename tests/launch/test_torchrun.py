"""launch/torchrun/*.sh: exit codes past torchrun, signals to the ranks, several nodes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solar_mega.checkpoint.store import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("ps") is None, reason="no bash or ps"
)


def start(script: str, *words: str, **environment: str) -> subprocess.Popen:
    python = Path(sys.executable)
    env = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(python.parents[1]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = ["bash", str(ROOT / "launch" / "torchrun" / script), *words]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def steps(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "grad_norm" in row]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_one_node_is_signalled_and_started_again(inputs, tmp_path, number):
    """Either signal saves and stops; a second start finishes what the first began."""
    out = tmp_path / "run"
    words = inputs.words(out, "--train.steps 60 --parallel.pp 2")
    first = start("one_node.sh", *words, NPROC="2", LOGS=str(tmp_path / "logs"))
    deadline = time.monotonic() + 150
    while len(steps(out)) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(number)
    code, output = finish(first)
    assert code == 75, output
    assert f"{number.name}: saved at step" in output and "start the same command again" in output
    left_at = steps(out)[-1]
    assert CheckpointStore(out / "checkpoints").latest().name == f"step-{left_at:08d}"
    if number != signal.SIGUSR1:
        return
    code, output = finish(start("one_node.sh", *words, NPROC="2", LOGS=str(tmp_path / "logs")))
    assert code == 0, output
    assert steps(out) == list(range(1, 61)) and (out / "hf" / "config.json").exists()


def test_several_nodes(inputs, tmp_path):
    """Two launchers, as on two machines, make one world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = inputs.words(tmp_path / "run")
    shared = dict(
        NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NPROC="1", LOGS=str(tmp_path / "logs")
    )
    nodes = [start("many_nodes.sh", *words, NODE_RANK=str(rank), **shared) for rank in range(2)]
    for code, output in map(finish, nodes):
        assert code == 0, output
    assert json.loads((tmp_path / "run" / "hf" / "lineage.json").read_text())
    assert "dp = 2" in (tmp_path / "run" / "config.toml").read_text() or steps(tmp_path / "run") == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_mistakes_keep_their_exit_code(inputs, tmp_path):
    words = inputs.words(tmp_path / "run", "--parallel.tp 3")
    code, output = finish(start("one_node.sh", *words, NPROC="2", LOGS=str(tmp_path / "logs")))
    assert code == 2 and "world size 2 is not a multiple" in output


@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [
        ("one_node.sh", {}, "no GPU here; say how many processes to start on the CPU: NPROC=2"),
        (
            "many_nodes.sh",
            {"NNODES": "2"},
            "NODE_RANK is not set; needed are NNODES, NODE_RANK and MASTER_ADDR",
        ),
    ],
)
def test_what_is_missing_is_said(script, environment, expected):
    if shutil.which("nvidia-smi") and script == "one_node.sh":
        pytest.skip("a machine with GPUs")
    code, output = finish(start(script, "pretrain", **environment))
    assert code == 2 and expected in output
    code, output = finish(start(script))
    assert code == 2 and "NPROC" in output
