"""What a configuration asks for and the machine does not have: each lack by key, all at once."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from solar_mega.config.schema import KernelConfig, ParallelConfig
from solar_mega.errors import UserError
from solar_mega.runtime.accelerators import Device, check_accelerators, describe, missing, needs

H100, B200, A100 = Device("H100", (9, 0)), Device("B200", (10, 0)), Device("A100", (8, 0))
MODULES = ("transformer_engine", "flash_attn", "fused_weight_gradient_mlp_cuda")
absent = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is not None for name in MODULES), reason="an accelerator is installed"
)

TE = (
    "needs Transformer Engine 2.9 or newer, which is not installed; pip install --no-build-isolation "
    '"solar-mega[te]", or choose'
)
APEX = (
    "needs apex's extension fused_weight_gradient_mlp_cuda, which is not installed; build apex from its "
    "repository with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or choose false"
)
FLASH = (
    "needs flash-attn 2.3 or newer, which is not installed; pip install --no-build-isolation "
    '"solar-mega[flash]", or choose "fused" or "sdpa"'
)


@absent
@pytest.mark.parametrize(
    ("kernels", "parallel", "expected"),
    [
        (dict(attention="flash"), {}, [f'kernels.attention = "flash" {FLASH}']),
        (dict(attention="te"), {}, [f'kernels.attention = "te" {TE} "fused", "sdpa" or "flash"']),
        (dict(linear="te"), {}, [f'kernels.linear = "te" {TE} "local"']),
        (
            dict(gradient_accumulation_fusion=True),
            {},
            [f"kernels.gradient_accumulation_fusion = true {APEX}"],
        ),
        (
            dict(linear="te", gradient_accumulation_fusion=True),
            {},
            [
                f'kernels.linear = "te" {TE} "local"',
                f"kernels.gradient_accumulation_fusion = true {TE} false",
            ],
        ),
        (dict(), dict(tp_comm_overlap=True), [f"parallel.tp_comm_overlap = true {TE} false"]),
    ],
)
def test_absent_libraries_are_named(kernels, parallel, expected):
    assert missing(needs(ParallelConfig(**parallel), KernelConfig(**kernels)), H100) == expected


@pytest.mark.parametrize(
    ("recipe", "device", "expected"),
    [
        ("tensorwise", A100, 'capability 8.9 or newer; this is A100, 8.0; choose "off"'),
        ("mxfp8", H100, '10.0 or newer; this is H100, 9.0; choose "tensorwise" or "blockwise" or "off"'),
        ("blockwise", None, 'capability 9.0 or newer; torch sees none here; choose "tensorwise" or "off"'),
        ("blockwise", H100, None),
        ("mxfp8", B200, None),
    ],
)
def test_the_gpu_must_be_new_enough(recipe, device, expected):
    lines = missing(needs(ParallelConfig(), KernelConfig(fp8=recipe)), device)
    assert (not lines) if expected is None else (len(lines) == 1 and lines[0].endswith(expected))


def _install(place: Path, package: str, distribution: str, version: str, code: str) -> None:
    """As pip leaves a package behind."""
    (place / package).mkdir(parents=True)
    (place / package / "__init__.py").write_text(code)
    metadata = place / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@absent
@pytest.mark.parametrize(
    ("version", "code", "expected"),
    [
        ("2.2.9", "", "needs flash-attn 2.3 or newer, and 2.2.9 is installed; pip install"),
        ("2.10.0+cu13", "", None),
        ("2.8", "import libcudart_of_another_torch", "cannot be imported (No module named 'libcudart_of"),
        ("2.8", "raise OSError('undefined symbol: x')", "cannot be imported (OSError: undefined symbol: x)"),
    ],
)
def test_what_is_installed_is_tried(version, code, expected, tmp_path, monkeypatch):
    _install(tmp_path, "flash_attn", "flash-attn", version, code)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = missing(needs(ParallelConfig(), KernelConfig(attention="flash")), H100)
    sys.modules.pop("flash_attn", None)
    assert (not lines) if expected is None else (len(lines) == 1 and expected in lines[0])


@absent
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_everything_at_once_before_a_model_is_built():
    from tests.train.tiny import Case, one_rank, start

    kernels = KernelConfig(attention="flash", linear="te", fp8="mxfp8")
    with one_rank(), pytest.raises(UserError, match="accelerators: 5 problems") as caught:
        start(Case(kernels=kernels))
    for key in ('kernels.attention = "flash"', 'kernels.linear = "te"', 'kernels.fp8 = "mxfp8"'):
        assert key in str(caught.value)


def test_the_defaults_need_nothing():
    assert needs(ParallelConfig(), KernelConfig()) == []
    check_accelerators(ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), KernelConfig())


def test_a_run_says_what_it_uses():
    assert describe(ParallelConfig(), KernelConfig()) == "attention fused, linears local"
    kernels = KernelConfig(linear="te", fp8="tensorwise", gradient_accumulation_fusion=True)
    assert describe(ParallelConfig(overlap_grad_reduce=True, tp_comm_overlap=True), kernels) == (
        "attention fused, linears te, fp8 tensorwise, fused weight gradients, overlapped: gradients "
        "tensor-parallel"
    )
