"""The compilers and disassemblers that the tests of csrc/ use, found or skipped over with the reason."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"


def toolkit_folders() -> list[Path]:
    """Where a CUDA toolkit, or pieces of one installed from packages, may lie."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    packages = sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*"))
    return [Path(home) for home in (*homes, "/usr/local/cuda", *packages)]


def find_tool(name: str) -> str | None:
    path = os.pathsep.join(str(folder / "bin") for folder in toolkit_folders())
    return shutil.which(name) or shutil.which(name, path=path)


def require_nvcc() -> str:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no CUDA compiler (nvcc) on PATH, in CUDA_HOME or /usr/local/cuda")
    return nvcc


def require_cuda_headers() -> Path:
    for folder in toolkit_folders():
        if (folder / "include" / "cuda_bf16.h").exists():
            return folder / "include"
    pytest.skip("no CUDA headers (cuda_bf16.h) in a toolkit or package")


def require_cxx() -> str:
    cxx = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    return cxx
