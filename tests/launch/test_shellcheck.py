"""Every script under launch/ is clean bash."""

import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(LAUNCH).as_posix())
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "--source-path", LAUNCH.parent, *SCRIPTS],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
    )
    assert done.returncode == 0, done.stdout
