"""Every kernel compiles for every GPU generation we name, spills nothing, and moves 16 bytes at a time."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from toolchain import CSRC, TORCH_INCLUDE, find_tool, require_nvcc

pytestmark = pytest.mark.nvcc

ARCHITECTURES = ["sm_80", "sm_90"]
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
# Kernels that must move 16 bytes per instruction, what they so move, and how many lesser accesses their code
# may have: one per row (rstd, a position, a target and its results), pairs of fp32 angles, elements before
# and after the vectors of a row that begins anywhere. Kernels not named take the rows that are not aligned,
# or a few bytes in all.
WIDE = {
    "dpo_loss": {},
    "qkv_rotary": {"qkv_rotary_kernel": ({"LDG", "STG"}, 5)},
    "rms_norm": {
        "rms_norm_forward_kernel": ({"LDG", "STG"}, 3),
        "rms_norm_backward_kernel": ({"LDG", "STG"}, 3),
    },
    "swiglu": {"swiglu_kernel": ({"LDG", "STG"}, 0)},
    "token_logprob": {
        "token_logprob_forward_kernel": ({"LDG"}, 20),
        "token_logprob_backward_kernel": ({"LDG", "STG"}, 6),
    },
}


class Build(NamedTuple):
    report: str
    """What ptxas says of each kernel's registers, stack and spills."""
    cubin: Path


def compile_one(nvcc: str, source: Path, architecture: str, folder: Path) -> Build:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    # A CPU build of torch has all the headers it takes: the stable ABI is a C interface.
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xptxas", "-v"]
    target = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{CSRC}", f"-I{TORCH_INCLUDE}"]
    command = [nvcc, f"-arch={architecture}", *flags, *target, "-cubin", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return Build(done.stderr, cubin)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Build]:
    nvcc, folder = require_nvcc(), tmp_path_factory.mktemp("cubin")
    wanted = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda pair: compile_one(nvcc, *pair, folder), wanted)
        return {(source.stem, arch): build for (source, arch), build in zip(wanted, done, strict=True)}


def test_every_source_is_listed():
    assert sorted(WIDE) == [source.stem for source in SOURCES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", [source.stem for source in SOURCES])
def test_no_spills(builds, stem, architecture):
    report = builds[stem, architecture].report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert kernels and len(kernels) == len(frames)
    spilled = [kernel for kernel, frame in zip(kernels, frames, strict=True) if frame != ("0", "0", "0")]
    assert not spilled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", list(WIDE))
def test_sixteen_byte_loads_and_stores(builds, stem, architecture):
    disassembler = find_tool("cuobjdump")
    if disassembler is None or find_tool("nvdisasm") is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = str(Path(find_tool("nvdisasm")).parent)
    command = [disassembler, "-sass", str(builds[stem, architecture].cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", text, flags=re.S))
    for name, (moved, most) in WIDE[stem].items():
        code = {function: body for function, body in functions.items() if name in function}
        assert code, f"no kernel {name} among {list(functions)}"
        for function, body in code.items():
            accesses = re.findall(r"\b(LDG|STG)\.E(\S*)", body)
            wide = {kind for kind, suffix in accesses if ".128" in suffix}
            narrow = [kind + suffix for kind, suffix in accesses if ".128" not in suffix]
            assert wide == moved and len(narrow) <= most, (function, narrow)
