"""The command as a user meets it: a process, its output, its exit code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from solar_mega import __main__ as cli
from solar_mega import __version__

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "megatron", "transformers", "numpy", "datasets")


def solar_mega(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "solar_mega", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def imported_by(*words: str) -> list[str]:
    """Heavy modules that running the command has loaded: what makes it slow, without a stopwatch."""
    program = (
        "import sys; from solar_mega.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_lists_every_verb_and_loads_nothing_heavy():
    done = solar_mega("--help")
    assert done.returncode == 0 and not done.stderr
    for verb, (_, text) in cli.VERBS.items():
        assert verb in done.stdout and text in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert imported_by("--help") == []


def test_every_verb_leads_somewhere_and_explains_itself():
    for verb in cli.VERBS:
        done = solar_mega(verb, "--help")
        assert done.returncode == 0, (verb, done.stderr)
        assert f"solar-mega {verb}" in done.stdout


@pytest.mark.parametrize("verb", ["convert", "verify", "inspect", "pretrain"])
def test_help_of_a_verb_is_light(verb):
    assert imported_by(verb, "--help") == []


def test_version():
    done = solar_mega("--version")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"solar-mega {__version__}"
    assert [line.split()[0] for line in lines[1:]] == ["torch", "megatron-core", "transformers", "python"]
    assert imported_by("--version") == []


def test_without_a_verb():
    done = solar_mega()
    assert done.returncode == cli.USAGE_ERROR and "usage: solar-mega" in done.stdout


def test_unknown_verb():
    done = solar_mega("pretrian", "--config", "x")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("solar-mega: unknown verb 'pretrian'; did you mean pretrain?")


def test_a_user_error_is_one_screen_without_a_traceback(tmp_path):
    config = tmp_path / "x.toml"
    config.write_text("[parallel]\ntpp = 2\n")
    done = solar_mega("pretrain", "--config", str(config), "--train.stepz=3")
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    for expected in ("did you mean parallel.tp?", "did you mean --train.steps?", "missing model.path"):
        assert expected in done.stderr
    assert len(done.stderr.splitlines()) < 24


def test_only_rank_0_shows_an_error_in_full():
    quiet = solar_mega("convert", RANK="3", WORLD_SIZE="4")
    full = solar_mega("convert", RANK="0", WORLD_SIZE="4")
    assert quiet.returncode == full.returncode == 2
    assert quiet.stderr == "solar-mega: rank 3: command line: 2 problems\n"
    assert "missing argument SRC" in full.stderr and "missing argument DST" in full.stderr


def test_a_closed_pipe_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "solar_mega", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""


def test_exit_codes_come_from_the_verb(monkeypatch):
    for given, expected in ((None, 0), (0, 0), (1, 1), (75, 75)):
        module = type(sys)("fake_verb")
        module.go = lambda argv, given=given: given
        monkeypatch.setitem(sys.modules, "fake_verb", module)
        monkeypatch.setitem(cli.VERBS, "fake", ("fake_verb:go", ""))
        assert cli.main(["fake"]) == expected


def test_console_script_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'solar-mega = "solar_mega.__main__:main"' in text


SCRIPTS = [path for path in (*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run") if path.is_file()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; syntax was checked with bash -n only")
    done = subprocess.run([shellcheck, "-x", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_env_refuses_an_unusable_python_before_touching_anything(tmp_path):
    """A copy, so that nothing is installed here."""
    (tmp_path / "launch").mkdir()
    for name in ("env.sh", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "pyproject.toml").touch()
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 2.7.18;; *) exit 1;; esac\n')
    old.chmod(0o755)
    for python, expected in (
        (str(old), "is Python 2.7.18; needed: 3.10 to 3.13"),
        ("nowhere", "no such program"),
    ):
        done = subprocess.run(
            ["bash", "-c", "source launch/env.sh; echo returned $?"],
            cwd=tmp_path,
            env={**os.environ, "SOLAR_MEGA_PYTHON": python},
            capture_output=True,
            text=True,
        )
        assert expected in done.stderr
        assert done.stdout.endswith("returned 1\n")  # the caller's shell is still there
        assert not (tmp_path / ".venv").exists()


def test_interrupting_a_process_gives_130():
    program = (
        "import sys, os, signal; from solar_mega import __main__ as cli\n"
        "cli.run = lambda argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and done.stderr == "solar-mega: interrupted\n"
