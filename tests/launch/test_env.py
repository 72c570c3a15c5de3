"""launch/env.sh never touches an environment that is not its own."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_linked_environment_is_left_alone(tmp_path):
    """Made by this script for another tree, and so with its stamp: it was emptied and made anew."""
    theirs = tmp_path / "theirs"
    (theirs / "bin").mkdir(parents=True)
    (theirs / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (theirs / "bin/python").chmod(0o755)
    (theirs / "solar_mega.stamp").write_text("root=/elsewhere\n")
    tree = tmp_path / "tree"
    (tree / "launch").mkdir(parents=True)
    for name in ("env.sh", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, tree / "launch")
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / ".venv").symlink_to(theirs)
    done = subprocess.run(["bash", "launch/env.sh"], cwd=tree, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is a link to" in done.stderr + done.stdout and "remove the link" in done.stderr + done.stdout
    assert (theirs / "bin/python").read_text() == "#!/bin/sh\nexit 1\n"
    assert (theirs / "solar_mega.stamp").read_text() == "root=/elsewhere\n"
