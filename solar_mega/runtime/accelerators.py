"""Optional libraries for GPUs that a configuration asks for: are they here, new enough, on a GPU that can?

    key                                              library                           compute capability
    kernels.attention = "flash"                      flash-attn                        8.0
    kernels.attention = "te", kernels.linear = "te"  Transformer Engine                8.0
    kernels.fp8 = "tensorwise"                       (that of linear = "te")           8.9
    kernels.fp8 = "blockwise"                        (that of linear = "te")           9.0
    kernels.fp8 = "mxfp8"                            (that of linear = "te")           10.0
    kernels.gradient_accumulation_fusion             apex's extension, or with linear  7.0
                                                     = "te" Transformer Engine
    parallel.tp_comm_overlap                         (that of linear = "te")           9.0

Least versions: Transformer Engine is held to what megatron-core 0.16 names, flash-attn to the first with
sliding windows. What keys need of each other stands in `config.check`.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from solar_mega.config.schema import KernelConfig, ParallelConfig
from solar_mega.errors import Problems


@dataclass(frozen=True)
class Library:
    name: str
    module: str
    """What is imported to see whether it works."""

    distribution: str | None
    """Whose version counts; None where there is none to ask for."""

    least: str | None
    install: str


TRANSFORMER_ENGINE = Library(
    "Transformer Engine",
    "transformer_engine.pytorch",
    "transformer-engine",
    "2.9",
    'pip install --no-build-isolation "solar-mega[te]"',
)
FLASH_ATTENTION = Library(
    "flash-attn", "flash_attn", "flash-attn", "2.3", 'pip install --no-build-isolation "solar-mega[flash]"'
)
APEX_FUSION = Library(
    "apex's extension fused_weight_gradient_mlp_cuda",
    "fused_weight_gradient_mlp_cuda",
    None,
    None,
    "build apex from its repository with APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
)


@dataclass(frozen=True)
class Need:
    """What one key asks of the machine."""

    key: str
    library: Library | None
    capability: tuple[int, int]
    """Least compute capability of the GPU."""

    otherwise: str
    """What to set instead."""


@dataclass(frozen=True)
class Device:
    """The GPU of this rank."""

    name: str
    capability: tuple[int, int]


_FP8 = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def needs(parallel: ParallelConfig, kernels: KernelConfig) -> list[Need]:
    """What these settings ask for beside torch and megatron-core; empty for the defaults."""
    found = []
    if kernels.attention == "flash":
        found.append(Need('kernels.attention = "flash"', FLASH_ATTENTION, (8, 0), '"fused" or "sdpa"'))
    if kernels.attention == "te":
        otherwise = '"fused", "sdpa" or "flash"'
        found.append(Need('kernels.attention = "te"', TRANSFORMER_ENGINE, (8, 0), otherwise))
    if kernels.linear == "te":
        found.append(Need('kernels.linear = "te"', TRANSFORMER_ENGINE, (8, 0), '"local"'))
    if kernels.fp8 != "off":
        narrower = [f'"{recipe}"' for recipe, least in _FP8.items() if least < _FP8[kernels.fp8]]
        otherwise = " or ".join([*narrower, '"off"'])
        found.append(Need(f'kernels.fp8 = "{kernels.fp8}"', None, _FP8[kernels.fp8], otherwise))
    if kernels.gradient_accumulation_fusion:
        library = APEX_FUSION if kernels.linear == "local" else TRANSFORMER_ENGINE
        key = "kernels.gradient_accumulation_fusion = true"
        found.append(Need(key, library, (7, 0), "false"))
    if parallel.tp_comm_overlap:
        found.append(Need("parallel.tp_comm_overlap = true", TRANSFORMER_ENGINE, (9, 0), "false"))
    return found


def this_device() -> Device | None:
    """None where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def missing(wanted: Sequence[Need], device: Device | None) -> list[str]:
    """What this process cannot give, a line for each key and lack: library, version, GPU."""
    found = []
    for need in wanted:
        library = need.library
        lack = None if library is None else _lack(library)
        if library is not None and lack is not None:
            newer = f" {library.least} or newer" if library.least else ""
            remedy = f"{library.install}, or choose {need.otherwise}"
            found.append(f"{need.key} needs {library.name}{newer}, {lack}; {remedy}")
        if device is None or device.capability < need.capability:
            has = "torch sees none here" if device is None else f"this is {_spell(device)}"
            least = ".".join(map(str, need.capability))
            found.append(
                f"{need.key} needs a GPU of compute capability {least} or newer; {has}; choose "
                f"{need.otherwise}"
            )
    return found


def check_accelerators(parallel: ParallelConfig, kernels: KernelConfig) -> None:
    """Raises UserError listing everything that the settings ask for and this process does not have."""
    wanted = needs(parallel, kernels)
    if not wanted:
        return
    problems = Problems()
    for text in missing(wanted, this_device()):
        problems.add(text)
    problems.raise_if_any("accelerators")


def describe(parallel: ParallelConfig, kernels: KernelConfig) -> str:
    """One line on what the layers run on, for the start of a run."""
    words = [f"attention {kernels.attention}", f"linears {kernels.linear}"]
    if kernels.fp8 != "off":
        words.append(f"fp8 {kernels.fp8}")
    if kernels.gradient_accumulation_fusion:
        words.append("fused weight gradients")
    overlapped = {
        "gradients": parallel.overlap_grad_reduce,
        "weights": parallel.overlap_param_gather,
        "tensor-parallel": parallel.tp_comm_overlap,
    }
    hidden = [what for what, overlaps in overlapped.items() if overlaps]
    return ", ".join([*words, *([f"overlapped: {' '.join(hidden)}"] if hidden else [])])


def _lack(library: Library) -> str | None:
    try:
        importlib.import_module(library.module)
    except ModuleNotFoundError as error:
        if error.name in (library.module, library.module.partition(".")[0]):
            return "which is not installed"
        return f"which cannot be imported ({error})"
    except Exception as error:  # whatever a library built for another torch or driver says
        return (
            f"which cannot be imported ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        )
    if library.distribution is None or library.least is None:
        return None
    try:
        found = version(library.distribution)
    except PackageNotFoundError:
        return None  # a build without metadata: it works, and does not say what it is
    return None if _number(found) >= _number(library.least) else f"and {found} is installed"


def _number(text: str) -> tuple[int, ...]:
    """2.10.0+abc -> (2, 10, 0)"""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _spell(device: Device) -> str:
    return f"{device.name}, {'.'.join(map(str, device.capability))}"
