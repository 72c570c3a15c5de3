"""Builds `solar_mega._C`, the C++/CUDA ops of csrc/, next to the Python package.

    pip install -e . --no-build-isolation      against the torch that is installed
    python setup.py build_ext --inplace        the same, rebuilding only what changed

What is compiled is decided here and printed (`pip -v` shows it); afterwards
`python -c "import solar_mega.ops; print(solar_mega.ops.build_info())"` tells.

    C++ compiler   CUDA compiler and a CUDA build of torch   result
    no             -                                         no extension: the PyTorch reference ops are used
    yes            no                                        CPU ops
    yes            yes                                       CPU and CUDA ops; no GPU is needed to build them

Environment:
    SOLAR_MEGA_CUDA       0: never build the CUDA ops; 1: fail when they cannot be built; unset: when they can
    TORCH_CUDA_ARCH_LIST  GPU architectures, default "8.0;9.0+PTX"
    CUDA_HOME, CXX        the toolkit and the C++ compiler to use
    MAX_JOBS              compilations at a time, default: the number of cores
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = "8.0;9.0+PTX"
# The oldest torch whose stable ABI the binary needs (2.10); it then loads under every newer one.
TORCH_TARGET = "0x020a000000000000"


def say(text: str) -> None:
    print(f"solar_mega build: {text}", file=sys.stderr, flush=True)


def find_cxx() -> str | None:
    """The C++ compiler that torch's build machinery will call, or None."""
    command = os.environ.get("CXX", "c++").split()[0]
    return shutil.which(command) or (None if "CXX" in os.environ else shutil.which("g++"))


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def name_cuda_home() -> None:
    """Tells torch's build machinery where the toolkit is: from an `nvcc` on PATH it would take the folder
    above, which for a link or a wrapper in /usr/local/bin is not the toolkit."""
    nvcc = find_nvcc()
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    for home in (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(home)
            return


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def why_no_cuda() -> str | None:
    """None when the CUDA ops can be built, otherwise what stands in the way."""
    import torch

    if os.environ.get("SOLAR_MEGA_CUDA") == "0":
        return "SOLAR_MEGA_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no CUDA compiler (nvcc) in CUDA_HOME or on PATH"
    # A CPU build of torch has no CUDA streams to launch on: a library with CUDA ops in it would not load.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {version} but torch was built with CUDA {torch.version.cuda}"
    return None


def with_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA ops, and the reason in words."""
    switch = os.environ.get("SOLAR_MEGA_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"SOLAR_MEGA_CUDA={switch}: must be 0, 1 or unset")
    reason = why_no_cuda()
    if reason is None:
        return True, f"for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    if switch == "1":
        raise SystemExit(f"SOLAR_MEGA_CUDA=1 but the CUDA ops cannot be built: {reason}")
    return False, reason


def cpu_flags() -> list[str]:
    # Portable code: wider vector units are chosen at run time (csrc/cpu/dispatch.h), so no -march here.
    # OpenMP's `simd` pragmas vectorise reductions and, unlike -ffast-math, keep IEEE semantics elsewhere.
    # Nothing here looks at floating-point exception flags; assuming so lets loops with a choice in them be
    # vectorised.
    semantics = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", *semantics, "-fvisibility=hidden", "-Wall"]


def extension():
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    cuda, reason = with_cuda()
    say(f"CPU ops: yes. CUDA ops: {'yes' if cuda else 'no'} ({reason}).")

    sources = [ROOT / "csrc" / "registration.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET),
        ("SOLAR_MEGA_BUILD_TORCH", f'"{torch.__version__}"'),
        ("SOLAR_MEGA_BUILD_CUDA_REASON", f'"{reason}"'),
    ]
    flags = {"cxx": cpu_flags()}
    if cuda:
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        defines += [("USE_CUDA", None), ("SOLAR_MEGA_WITH_CUDA", None)]
        flags["nvcc"] = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
    make = CUDAExtension if cuda else CppExtension
    return make(
        "solar_mega._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")],
        define_macros=defines,
        extra_compile_args=flags,
        py_limited_api=True,  # likewise one binary for every Python from 3.10 on
    )


def build_arguments() -> dict:
    name_cuda_home()
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        raise SystemExit(
            "solar_mega is compiled against the torch that is installed, and none is importable here. "
            "Install torch >= 2.10 first, then run `pip install --no-build-isolation .` "
            "(launch/env.sh does both)."
        ) from None
    if find_cxx() is None:
        wanted = os.environ.get("CXX", "c++ or g++")
        say(f"no C++ compiler ({wanted}): installing WITHOUT the compiled ops; PyTorch reference ops it is.")
        return {}
    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
