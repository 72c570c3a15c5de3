"""Where the ops' tests run: devices, dtypes, and narrower instruction sets than this machine's."""

import os
import subprocess
import sys

import pytest
import torch

from solar_mega import ops

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not (torch.cuda.is_available() and ops.available("cuda")),
            reason="no GPU, or ops built without CUDA",
        ),
    ],
)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROWER = ["base", "avx2"]


def run_again_on(isa: str, file: str, select: str) -> None:
    """The tests of `file` that `-k select` picks, in a process that may use no wider vectors than `isa`."""
    if os.environ.get("SOLAR_MEGA_CPU_ISA"):
        pytest.skip("already inside such a process")
    environment = os.environ | {"SOLAR_MEGA_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", select]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if f"SOLAR_MEGA_CPU_ISA={isa}: this machine allows base up to" in done.stdout:
        pytest.skip(f"this machine's processor has no {isa}")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
