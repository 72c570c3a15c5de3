"""launch/gpu_check.sh on machines without a GPU, and its bookkeeping with a pretended one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# Lists hundreds of GPUs, line by line, so that nobody may stop reading after the first.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    -L) for i in $(seq 0 999); do echo "GPU $i: Pretended GPU 9000 (UUID: none)" || exit 3; done ;;
    *--id=5*) echo "No devices were found"; exit 6 ;;
    *--id=7*query-gpu=name*) echo "Another GPU" ;;
    *query-gpu=name*) echo "Pretended GPU 9000" ;;
    *driver_version*) echo "1.2.3" ;;
    *compute_cap*) echo "9.0" ;;
esac
"""

# For Python: calls with a word of $FAIL fail, with one of $HANG hang, others pass; scripts on stdin are run.
PYTHON = f"""#!/bin/sh
if [ "$1" = "-" ]; then exec {sys.executable} "$@"; fi
echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER $TORCH_CUDA_ARCH_LIST python $*" >> "$CALLS"
for word in $FAIL; do case "$*" in *"$word"*) echo "something broke"; exit 3 ;; esac; done
for word in $HANG; do case "$*" in *"$word"*) sleep 60 ;; esac; done
exit 0
"""


def check(
    tmp_path: Path, *arguments: str, gpu: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    sanitizer = '#!/bin/sh\nwhile [ "$1" != "$GPU_CHECK_PYTHON" ]; do shift; done\nexec "$@"\n'
    scripts = {"python-here": PYTHON, "compute-sanitizer": sanitizer}
    scripts["nvidia-smi"] = NVIDIA_SMI if gpu else "#!/bin/sh\necho 'No devices were found'\nexit 6\n"
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "GPU_CHECK_PYTHON": str(tools / "python-here")}
    variables |= {"CALLS": str(tmp_path / "calls"), "FAIL": "", "HANG": ""} | environment
    clean = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=clean | variables, capture_output=True, text=True, timeout=120
    )


def test_no_gpu_is_said_and_nothing_is_done(tmp_path):
    done = check(tmp_path, str(tmp_path / "results"), gpu=False)
    assert done.returncode == 2 and "no GPU here" in done.stderr
    assert not (tmp_path / "results").exists() and not (tmp_path / "calls").exists()


def test_all_parts_run_for_the_gpu_at_hand_and_are_summed_up(tmp_path):
    folder = tmp_path / "results"
    done = check(tmp_path, str(folder))
    assert done.returncode == 0 and "all parts passed" in done.stdout, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["device"], summary["driver"]) == ("Pretended GPU 9000", "1.2.3")
    names = [part["name"] for part in summary["parts"]]
    assert names == (
        ["build", "gpu-is-used", "tests", "memcheck", "racecheck", "bench-dpo", "bench-kernels", "bench-step"]
    )
    assert {part["verdict"] for part in summary["parts"]} == {"passed"}
    calls = (tmp_path / "calls").read_text()
    assert "9.0 python setup.py build_ext --inplace --force" in calls and "pytest -q -m cuda" in calls
    assert f"bench kernels --limit 2 --out {folder}/kernels.json --plot {folder}/kernels.png" in calls
    assert calls.count("solar_mega.bench.exercise") == 2


def test_a_failing_part_does_not_stop_the_others(tmp_path):
    folder = tmp_path / "results"
    done = check(tmp_path, str(folder), FAIL="no:cacheprovider kernels.json")
    assert done.returncode == 1
    assert "NOT all passed" in done.stdout and "tests (failed), bench-kernels (failed)" in done.stdout
    assert "    | something broke" in done.stdout
    parts = {part["name"]: part for part in json.loads((folder / "summary.json").read_text())["parts"]}
    assert parts["tests"]["exit_code"] == 3 and parts["bench-step"]["verdict"] == "passed"
    assert (folder / "logs" / "tests.log").read_text() == "something broke\n"


def test_without_compiled_ops_nothing_is_measured(tmp_path):
    """The fallback to PyTorch would stand in the results under our name."""
    folder = tmp_path / "results"
    done = check(tmp_path, str(folder), FAIL="build_ext available")
    assert done.returncode == 1 and "skipped: no compiled CUDA ops" in done.stdout
    parts = json.loads((folder / "summary.json").read_text())["parts"]
    verdicts = [part["verdict"] for part in parts]
    assert verdicts == ["failed", "failed", *["skipped"] * 6]
    assert "bench" not in (tmp_path / "calls").read_text()


def test_the_gpu_described_is_the_one_used(tmp_path):
    folder = tmp_path / "results"
    done = check(tmp_path, str(folder), CUDA_VISIBLE_DEVICES="7,0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "summary.json").read_text())["device"] == "Another GPU"
    assert (tmp_path / "calls").read_text().startswith("7 PCI_BUS_ID 9.0 python setup.py")
    done = check(tmp_path, str(folder), CUDA_VISIBLE_DEVICES="5")
    assert done.returncode == 2 and "nvidia-smi knows no GPU 5" in done.stderr


def test_time_runs_out(tmp_path):
    done = check(tmp_path, str(tmp_path / "results"), HANG="setup.py", GPU_CHECK_SECONDS="12")
    assert done.returncode == 1
    assert "build (timed out)" in done.stdout and "tests (skipped)" in done.stdout


def test_usage():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: bash launch/gpu_check.sh [FOLDER]" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", str(SCRIPT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
