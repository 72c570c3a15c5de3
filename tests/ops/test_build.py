"""What is compiled in is reported; what is missing is announced and replaced; setup.py decides as it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toolchain import ROOT

from solar_mega import ops


def python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


# A finder that hides the extension, as if there had been no compiler.
HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "solar_mega._C":
            raise ImportError("no such module")
sys.meta_path.insert(0, Hide())
"""


def test_build_info_names_the_extension_and_its_choices():
    info = ops.build_info()
    if not ops.available():
        assert info["extension"] is None and info["problem"]
        pytest.skip(f"no extension here: {info['problem']}")
    assert Path(info["extension"]).exists() and info["problem"] is None
    assert info["cpu_isa"] in ("base", "avx2", "avx512")
    assert info["cuda"] == ops.available("cuda")
    assert info["cuda_reason"] in ops.report()


def test_without_the_extension_the_reference_is_used_and_announced_once():
    code = """
import torch, warnings
from solar_mega import ops
assert not ops.available() and ops.build_info()["extension"] is None
assert ops.report().startswith("ops: PyTorch reference, slower (no compiled extension: no such module)")
x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y, total = ops.add_rms_norm(x, x, w, 1e-5)
        y.sum().backward()
assert torch.equal(y, ops.rms_norm_reference(2 * x, w, 1e-5)), y
assert len(caught) == 1, caught
assert "solar_mega.ops uses its slower PyTorch reference on cpu" in str(caught[0].message)
print("fine")
"""
    done = python(HIDE + code)
    assert done.stdout == "fine\n", done.stderr


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices():
    done = python("from solar_mega import ops; print(ops.report())", SOLAR_MEGA_CPU_ISA="sse9")
    if not ops.available():
        pytest.skip(ops.report())
    assert "SOLAR_MEGA_CPU_ISA=sse9: this machine allows base up to" in done.stdout


SETUP = f"""
import runpy, setuptools, sys
setuptools.setup = lambda **given: print("EXTENSIONS", [e.sources for e in given.get("ext_modules", [])])
sys.path.insert(0, {str(ROOT)!r})
{{prelude}}
runpy.run_path({str(ROOT / "setup.py")!r}, run_name="__main__")
"""
# A CUDA build of torch, as far as setup.py and torch's extension builder look.
CUDA_TORCH = """
import os, torch, torch.utils.cpp_extension
torch.version.cuda = "13.0"
torch.utils.cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
"""


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"SOLAR_MEGA_CUDA": "0"}, "CUDA ops: no (SOLAR_MEGA_CUDA=0)"),
        (
            {"CXX": "no-such-compiler"},
            "no C++ compiler (no-such-compiler): installing WITHOUT the compiled ops",
        ),
        ({"SOLAR_MEGA_CUDA": "yes"}, "SOLAR_MEGA_CUDA=yes: must be 0, 1 or unset"),
    ],
)
def test_setup_says_what_it_builds(environment, message):
    done = python(SETUP.format(prelude=""), **environment)
    assert message in done.stderr, done.stderr


def test_cuda_asked_for_without_a_compiler_is_an_error(tmp_path):
    done = python(SETUP.format(prelude=CUDA_TORCH), SOLAR_MEGA_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "EXTENSIONS" not in done.stdout
    assert "SOLAR_MEGA_CUDA=1 but the CUDA ops cannot be built: no CUDA compiler (nvcc)" in done.stderr


def test_cuda_sources_need_no_gpu_only_the_compiler_and_a_cuda_torch(tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    for release, built in (("13.2", True), ("11.8", False)):
        compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
        compiler.chmod(0o755)
        done = python(SETUP.format(prelude=CUDA_TORCH), CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="9.0")
        if "no C++ compiler" in done.stderr:
            pytest.skip("no C++ compiler")
        assert ("csrc/cuda/rms_norm.cu" in done.stdout) == built, done.stderr
        wanted = (
            "CUDA ops: yes (for 9.0)" if built else "CUDA ops: no (nvcc is CUDA 11.8 but torch was built with"
        )
        assert wanted in done.stderr, done.stderr
