"""`solar-mega plot`, and the trackers beside metrics.jsonl."""

import json
import math

import pytest

from solar_mega.__main__ import main
from solar_mega.errors import Problems, UserError
from solar_mega.runtime import trackers


def write_run(directory, steps, loss):
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            row = {"step": step, "tokens": 100 * step, "flops": 1e6 * step, "loss": loss + 1 / step}
            row |= {"grad_norm": 1.0, "lr": 1e-3, "seconds": 0.5, "tokens_per_second": 200.0}
            stream.write(json.dumps({**row, "memory_bytes": 10**9}) + "\n")
            if step % 5 == 0:
                stream.write(
                    json.dumps({"step": step, "tokens": 100 * step, "flops": 1e6 * step, "val_loss": loss})
                )
                stream.write("\n")
    return directory


def test_runs_are_drawn_beside_each_other(tmp_path, capsys):
    first, second = write_run(tmp_path / "a" / "run", 20, 3.0), write_run(tmp_path / "b" / "run", 10, 2.5)
    out = tmp_path / "deep" / "runs.png"
    for axis in ("step", "hours"):
        assert main(["plot", str(first), str(second), "--out", str(out), "--x", axis, "--smooth", "3"]) == 0
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    said = capsys.readouterr().out
    assert (
        str(first) in said
        and str(second) in said
        and "3.0500" in said
        and "2.5000" in said
        and "1 GB" in said
    )


def test_what_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "empty"), "--out", str(tmp_path / "x.png")]) == 2
    assert "no metrics.jsonl there" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert main(["plot", str(tmp_path / "empty"), "--out", str(tmp_path / "x.png")]) == 2
    assert "holds no training step yet" in capsys.readouterr().err


def test_missing_trackers_are_problems(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problems = Problems()
    trackers.check_installed(True, True, problems)
    assert len(problems.texts) == 2
    assert "output.tensorboard" in problems.texts[0] and "pip install wandb" in problems.texts[1]


def test_sinks_get_every_row_and_curves_are_finite_numbers():
    class Memory:
        def __init__(self):
            self.rows, self.closed = [], False

        def write(self, record):
            self.rows.append(record)

        def close(self):
            self.closed = True

    one, two = Memory(), Memory()
    both = trackers.Sinks([one, two])
    row = {"step": 3, "tokens": 1, "loss": 2.0, "grad_norm": math.nan, "text": "x"}
    both.write(row)
    both.close()
    assert one.rows == two.rows == [row] and one.closed and two.closed
    assert trackers._curves(row) == {"loss": 2.0}


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = trackers.TensorBoard(tmp_path, 0)
    for step in (1, 2):
        board.write({"step": step, "loss": 3.0 - step})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_wandb_offline(tmp_path, monkeypatch):
    """The mode may come from the environment, as users of wandb know it; a resumed run writes beside the
    first."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for mode, step in ((None, 1), ("offline", 2)):
        run = trackers.WandB(tmp_path, "tests", mode, "steps = 1")
        run.write({"step": step, "loss": 2.0, "kind": "word", "grad_norm": float("nan")})
        run.write({"step": step, "val_loss": 2.5})
        run.close()
        files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        assert len(files) >= 1
        kept = b"".join(file.read_bytes() for file in files)
        assert b"val_loss" in kept and b"steps = 1" in kept and b"grad_norm" not in kept


def test_wandb_without_a_login_is_an_error_of_the_users(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where logins are kept
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match='output.wandb = "tests", mode online.*wandb_mode = "offline"'):
        trackers.WandB(tmp_path, "tests", None, "")
