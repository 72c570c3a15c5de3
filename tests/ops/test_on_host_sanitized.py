"""The kernels' bodies on the CPU, and the CPU's attention op, once more under AddressSanitizer: no access
outside any tensor or shared array.

Python is started with the sanitizer's allocator, which puts guarded zones around the tensors torch allocates;
the kernels are compiled with its checks. `CXX` is a script that adds the flag, so the tests themselves do not
change.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from toolchain import CSRC, TORCH_INCLUDE, require_cuda_headers, require_cxx

HERE = Path(__file__).parent
SUITES = sorted(HERE.glob("test_*_on_host.py"))

# Reads one element past a row that ends where its tensor ends.
BEYOND = """
#include "cuda_on_host.h"
#include "cuda/token_logprob.cuh"
extern "C" void beyond(float* row, int n, float* out) {
  cuda_on_host::run_grid(1, 32, 0, [&] {
    const auto r = solar_mega::scan_row<float, false>(row, n + 1);
    if (threadIdx.x == 0) *out = r.sum;
  });
}
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process under AddressSanitizer whose C++ compiler instruments what it builds."""
    cxx = require_cxx()
    found = subprocess.run(
        [cxx, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{cxx} has no AddressSanitizer library to load (libasan.so)")
    wrapper = tmp_path_factory.mktemp("asan") / "cxx"
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec "{cxx}" -fsanitize=address "$@"\n')
    wrapper.chmod(0o755)
    # Fibers switch stacks by themselves; Python does not free everything at exit.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "CXX": str(wrapper), "LD_PRELOAD": found, "ASAN_OPTIONS": options}


def run_sanitized(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    # Where the kernel randomises addresses by 32 bits, older sanitizers now and then find their shadow memory
    # taken at start and never come out of their signal handler: no randomisation, and a limit.
    fixed = ["setarch", "-R"] if _runs(["setarch", "-R", "true"]) else []
    command = [*fixed, sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _runs(command: list[str]) -> bool:
    found = shutil.which(command[0]) is not None
    return found and subprocess.run(command, capture_output=True).returncode == 0


def test_no_access_out_of_bounds(sanitized):
    """All suites in one process: torch is slow to import under the sanitizer. The process ends at the first
    access out of bounds, after the name of the test that made it."""
    done = run_sanitized(["-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, SUITES)], sanitized)
    assert done.returncode == 0, (done.stdout[-3000:] + done.stderr)[-9000:]
    assert len(SUITES) == 5 and all(f"{suite.name}::" in done.stdout for suite in SUITES)


@pytest.fixture(scope="module")
def attention(sanitized, tmp_path_factory) -> Path:
    """The CPU's causal attention op, instrumented, with the registration of all ops."""
    library = tmp_path_factory.mktemp("attention") / "attention.so"
    sources = [CSRC / "registration.cpp", CSRC / "cpu" / "causal_attention.cpp"]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    defines += ['-DSOLAR_MEGA_BUILD_TORCH="this"', '-DSOLAR_MEGA_BUILD_CUDA_REASON="a test"']
    includes = [f"-I{folder}" for folder in (CSRC, TORCH_INCLUDE, sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-w", *defines, *includes]
    libraries = [f"-L{TORCH_INCLUDE.parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    words = [sanitized["CXX"], *flags, *map(str, sources), "-o", str(library), *libraries]
    subprocess.run(words, check=True)
    return library


@pytest.mark.parametrize("isa", ["base", ""], ids=["base", "widest"])
def test_causal_attention_over_packed_samples(sanitized, attention, isa):
    calls = str(HERE / "causal_attention_calls.py")
    done = run_sanitized([calls, str(attention)], {**sanitized, "SOLAR_MEGA_CPU_ISA": isa})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_an_access_out_of_bounds_is_seen(sanitized, tmp_path):
    source, library = tmp_path / "beyond.cpp", tmp_path / "beyond.so"
    source.write_text(BEYOND)
    includes = [f"-I{CSRC}", f"-I{HERE}", f"-I{require_cuda_headers()}"]
    command = [sanitized["CXX"], "-O1", "-g1", "-std=c++17", "-shared", "-fPIC", "-w", *includes]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    call = (
        "import ctypes, torch; row, out = torch.zeros(37), torch.zeros(1); "
        f"ctypes.CDLL({str(library)!r}).beyond("
        "ctypes.c_void_p(row.data_ptr()), 37, ctypes.c_void_p(out.data_ptr()))"
    )
    done = run_sanitized(["-c", call], sanitized)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
