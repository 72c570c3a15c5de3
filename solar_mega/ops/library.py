"""The compiled extension `solar_mega._C`: what is there, and what is said when something is missing.

Importing the extension registers `torch.ops.solar_mega.*`. Without it (no C++ compiler at install time), and
for devices it was not compiled for, the public functions compute their PyTorch reference instead and say so
once; `report()` is for the program's start, so that nobody finds out from a slow run.
"""

import platform
import warnings
from typing import Any

import torch

REBUILD = "pip install -e . --no-build-isolation -v"

_extension: Any = None
_problem: str | None = None
try:
    import solar_mega._C as _extension
except ImportError as error:
    _problem = str(error)

devices: frozenset[str] = frozenset()
"""Types of device that have compiled ops: `cpu`, `cuda`, both or none."""
if _extension is not None:
    devices = frozenset({"cpu", "cuda"} if _extension.cuda else {"cpu"})

_warned: set[str] = set()


def available(device: str = "cpu") -> bool:
    """Whether there are compiled ops for this type of device."""
    return device in devices


def build_info() -> dict[str, Any]:
    """What is compiled in, and under what it runs.

    `extension` is its file, or None with the reason under `problem`. `cpu_isa` is the vector instruction set
    chosen for this machine, `cuda` whether CUDA ops are compiled in and `cuda_reason` why not or for which
    GPUs; `built_with_torch` and `compiler` are those of the build.
    """
    info: dict[str, Any] = {
        "extension": getattr(_extension, "__file__", None),
        "problem": _problem,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if _extension is not None:
        info |= {
            "cpu_isa": _extension.cpu_isa,
            "cuda": bool(_extension.cuda),
            "cuda_reason": _extension.cuda_reason,
            "built_with_torch": _extension.torch,
            "compiler": _extension.compiler,
        }
    return info


def report() -> str:
    """One line for the program's start: which ops run compiled and which as PyTorch reference."""
    if _extension is None:
        return f"ops: PyTorch reference, slower (no compiled extension: {_problem}). To build it: {REBUILD}"
    cuda = f"CUDA {_extension.cuda_reason}" if _extension.cuda else f"no CUDA: {_extension.cuda_reason}"
    return f"ops: compiled, CPU {_extension.cpu_isa}, {cuda}"


def use_compiled(implementation: str, device: str) -> bool:
    """Decides for one call; falling back is announced once per device.

    Raises ValueError for an `implementation` other than "fused" and "reference".
    """
    if implementation == "fused":
        if device in devices:
            return True
        _announce_fallback(device)
        return False
    if implementation == "reference":
        return False
    raise ValueError(f'implementation is {implementation!r}; allowed: "fused", "reference"')


def _announce_fallback(device: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    if _extension is None:
        reason = f"the compiled extension is missing ({_problem})"
    elif device == "cuda":
        reason = f"it was compiled without CUDA ({_extension.cuda_reason})"
    else:
        reason = "it is compiled for cpu and cuda only"
    text = f"solar_mega.ops uses its slower PyTorch reference on {device}: {reason}. To build it: {REBUILD}"
    warnings.warn(text, RuntimeWarning, stacklevel=4)
