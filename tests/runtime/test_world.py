"""A world that was left is gone before the interpreter ends: see `parallel._let_go`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

SCRIPT = """
import atexit, os, sys

def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return sorted(name for name in names if "gloo" in name)

def check():  # registered first, called last
    if gloo_threads():
        print("at the end:", gloo_threads(), file=sys.stderr, flush=True)
        os._exit(3)

atexit.register(check)
from solar_mega.config.schema import ParallelConfig
from solar_mega.runtime import parallel as ranks
"""

CASES = {
    "the world alone": """
ranks.join_world()
import torch.distributed.nn.functional  # as transformers and megatron-core do
ranks.gather(1)
assert "pt_gloo_runloop" in gloo_threads()
ranks.stop()
assert not gloo_threads()
""",
    "Megatron's groups": """
with ranks.running(ParallelConfig(tp=2)):
    ranks.gather(1)
assert not gloo_threads()
""",
    "a model that refers to itself": """
from megatron.core import parallel_state
class Model: pass
with ranks.running(ParallelConfig(tp=2)):
    model = Model()
    model.itself, model.group = model, parallel_state.get_tensor_model_parallel_group()
    del model
assert gloo_threads()
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("case", CASES)
def test_no_thread_of_it_stays(case, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + CASES[case])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
