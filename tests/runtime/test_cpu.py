"""Megatron on a CPU: what the patches answer, and what they leave alone. Each test has a process of its own,
as the patches stay."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter refuses machines with CUDA")


def run(program: str) -> str:
    start = "import torch\nfrom solar_mega.runtime import cpu\n"
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_devices_by_name():
    run("""
cpu.install(); cpu.install()
for make in (torch.zeros, torch.ones, torch.empty):
    assert make(2, device="cuda").device.type == make(2, device="cuda:0").device.type == "cpu"
    assert make(2, device="meta").device.type == "meta"
x = torch.zeros(2)
assert torch.empty_like(x, device="cuda").device.type == "cpu" and x.cuda() is x
assert torch.tensor([1.0], device="cuda").tolist() == [1.0]
assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.float64).dtype == torch.float64
assert torch.cuda.current_device() == torch.device("cpu")
""")


def test_device_contexts_still_work():
    """transformers builds models under `torch.device("meta")`; where that fails it loads them wrong."""
    run("""
cpu.install()
with torch.device("meta"):
    for tensor in (torch.empty(2), torch.zeros(2), torch.ones(2), torch.tensor([1.0]), torch.arange(3)):
        assert tensor.device.type == "meta"
    assert torch.nn.Linear(2, 2).weight.device.type == "meta"
assert torch.empty(2).device.type == "cpu"
""")


def test_refused_where_cuda_is():
    run("""
torch.cuda.is_available = lambda: True
try: cpu.install()
except RuntimeError as error: assert "CUDA" in str(error)
else: raise SystemExit("installed")
""")
