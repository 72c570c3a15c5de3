"""Directories built over several attempts: what is kept, what is thrown away, who is left alone."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from solar_mega.errors import UserError
from solar_mega.runtime.partial import SideJobs, fingerprint, left_behind, resumable_directory

PLAN = {"of": "something", "map": [1, 2, 3]}


def killed(target, units: int, plan=PLAN) -> None:
    """A process that finishes some units, starts another and is killed."""
    code = f"""
        import os, signal
        from solar_mega.runtime.partial import resumable_directory
        with resumable_directory({str(target)!r}, {plan!r}) as partial:
            (partial.path / "deep").mkdir()
            for unit in range({units}):
                (partial.path / "deep" / f"{{unit}}").write_text("whole")
                partial.finish(str(unit), {{"note": unit}})
            (partial.path / "deep" / "half").write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_same_plan_goes_on(tmp_path, capsys):
    target = tmp_path / "made"
    killed(target, 2)
    assert not target.exists() and left_behind(target) > 0
    with resumable_directory(target, PLAN) as partial:
        assert partial.done() == {"0": {"note": 0}, "1": {"note": 1}}
        partial.clean(keep={f"deep/{unit}" for unit in partial.done()})
        assert sorted(os.listdir(partial.path / "deep")) == ["0", "1"]
        (partial.path / "deep" / "2").write_text("whole")
    assert "2 finished parts are kept" in capsys.readouterr().out
    assert sorted(os.listdir(target / "deep")) == ["0", "1", "2"]
    assert sorted(os.listdir(target)) == ["deep"] and os.listdir(tmp_path) == ["made"]


def test_another_plan_starts_over_and_says_so(tmp_path, capsys):
    target = tmp_path / "made"
    killed(target, 2)
    with resumable_directory(target, {**PLAN, "map": [1]}) as partial:
        assert partial.done() == {} and not (partial.path / "deep").exists()
    assert "made of something else" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["made"]


def test_an_error_removes_ctrl_c_keeps(tmp_path, capsys):
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), resumable_directory(target, PLAN) as partial:
        partial.finish("0")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), resumable_directory(target, PLAN) as partial:
        partial.finish("0")
        raise KeyboardInterrupt
    assert "the same command continues" in capsys.readouterr().out
    with resumable_directory(target, PLAN) as partial:
        assert partial.done() == {"0": None}
    assert os.listdir(tmp_path) == ["made"]


def test_a_note_cut_short_is_no_note(tmp_path):
    target = tmp_path / "made"
    killed(target, 2)
    (left,) = tmp_path.iterdir()
    (left / ".work" / "done-1.json").write_text('{"note"')
    with resumable_directory(target, PLAN) as partial:
        assert partial.done() == {"0": {"note": 0}}


def test_who_still_holds_it_is_left_alone(tmp_path):
    """The owner was killed, another process of the same run lives: nobody takes the directory from it."""
    target = tmp_path / "made"
    killed(target, 1)
    (left,) = tmp_path.iterdir()
    code = f"""
        import sys
        from pathlib import Path
        from solar_mega.runtime.partial import Partial
        with Partial(Path({str(left)!r})).held():
            print("ready", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rival:
        assert rival.stdout.readline() == "ready\n"
        with resumable_directory(target, PLAN) as partial:
            assert partial.path != left and partial.done() == {}
        assert left.exists()
        rival.stdin.close()
        assert rival.wait() == 0


def test_one_writer_at_a_time(tmp_path):
    with (
        resumable_directory(tmp_path / "made", PLAN),
        pytest.raises(UserError, match="written by another run"),
        resumable_directory(tmp_path / "made", PLAN),
    ):
        pass


def test_side_jobs_hold_back_and_report():
    started = threading.Semaphore(0)
    go = threading.Event()

    def job():
        started.release()
        go.wait(10)

    with SideJobs(limit=2) as beside:
        beside.submit(job)
        beside.submit(job)
        late = threading.Thread(target=beside.submit, args=(job,))
        late.start()
        started.acquire()
        time.sleep(0.05)
        assert late.is_alive(), "the third waits until one is done"
        go.set()
        late.join(10)
        assert not late.is_alive()
    with pytest.raises(ZeroDivisionError), SideJobs() as beside:
        beside.submit(lambda: 1 / 0)
    with pytest.raises(KeyError), SideJobs() as beside:
        beside.submit(lambda: 1 / 0)
        raise KeyError("the first error counts")


def test_fingerprint_sees_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("x")
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path) and list(before) == ["a"]
    (tmp_path / "a").write_text("xy")
    assert fingerprint(tmp_path) != before
