"""metrics.jsonl: one history through crashes and resumes."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from solar_mega.errors import UserError
from solar_mega.runtime.metrics import MetricsWriter, read_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def write(path, *numbers):
    with MetricsWriter(path) as metrics:
        for number in numbers:
            metrics.write({"step": number, "loss": 1 / (number + 1)})


def test_values_come_back(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    record = {
        "step": 3,
        "loss": math.nan,
        "grad_norm": math.inf,
        "low": -math.inf,
        "note": "é\n",
        "flag": True,
        "none": None,
        "shares": (0.5, math.nan),
        "nested": {"lr": np.float32(0.25), "n": np.int64(7)},
    }
    with MetricsWriter(path) as metrics:
        metrics.write(record)
        assert len(read_metrics(path)) == 1  # flushed before it is closed
    [back] = read_metrics(path)
    assert math.isnan(back["loss"]) and back["grad_norm"] == math.inf and back["low"] == -math.inf
    assert back["note"] == "é\n" and back["flag"] is True and back["none"] is None
    assert back["shares"][0] == 0.5 and math.isnan(back["shares"][1])
    assert back["nested"] == {"lr": 0.25, "n": 7}

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_torch_scalars(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write({"loss": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert read_metrics(path) == [{"loss": 0.5}]


def test_a_step_that_is_run_again_appears_once(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, *range(1, 31))
    with MetricsWriter(path) as metrics:
        assert metrics.truncate_after(20) == 10
        metrics.write({"step": 21, "loss": 0.0})
    assert steps(path) == list(range(1, 22))
    assert read_metrics(path)[-1]["loss"] == 0.0


def test_truncating_at_the_ends(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3)
    with MetricsWriter(path) as metrics:
        assert metrics.truncate_after(3) == 0
        assert metrics.truncate_after(-1) == 3
        assert metrics.truncate_after(-1) == 0
    assert path.read_bytes() == b""


def test_records_without_a_step_stay_where_they_are(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as metrics:
        for record in ({"event": "start"}, {"step": 1}, {"event": "saved"}, {"step": 2}, {"event": "end"}):
            metrics.write(record)
        assert metrics.truncate_after(1) == 2  # step 2 and what followed it
    assert read_metrics(path) == [{"event": "start"}, {"step": 1}, {"event": "saved"}]


def test_a_torn_line_is_not_read_and_goes_when_writing_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2)
    whole = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert steps(path) == [1, 2]
    with MetricsWriter(path) as metrics:
        assert path.stat().st_size == whole
        metrics.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_file_that_is_one_long_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x" * 200_000)
    with MetricsWriter(path):
        assert path.stat().st_size == 0


def test_damage_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: not a JSON object"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)
    with pytest.raises(UserError, match="no such metrics file"):
        read_metrics(tmp_path / "absent")


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    program = (
        "import sys; from solar_mega.runtime.metrics import MetricsWriter\n"
        "metrics = MetricsWriter(sys.argv[1])\n"
        "for step in range(10**9): metrics.write({'step': step, 'pad': 'x' * 500})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    while process.poll() is None and not (path.exists() and path.stat().st_size > 100_000):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = steps(path)
    assert done == list(range(len(done))) and len(done) > 100
