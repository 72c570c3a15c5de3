"""megatron-core on a machine without CUDA: the laptop runs the cluster's code, not a second trainer.

Megatron asks for its device in three ways only, and each gets one answer here:

    torch.cuda.current_device(), .synchronize(), .get_rng_state(), ...   -> CPU counterparts      (_CUDA)
    torch.zeros(..., device="cuda") and four other factories             -> the same on the CPU   (_FACTORIES)
    tensor.cuda(), tensor.type() == "torch.cuda.FloatTensor"             -> itself, that answer   (_METHODS)

Patching these names rather than entering a `TorchFunctionMode` keeps every other torch call at full speed:
a mode costs microseconds on each of the hundreds of calls of a small model's step.

`install` refuses to run where CUDA exists, so a GPU job can never train on its CPU by accident.
"""

import functools
import warnings

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like")
_installed = False


def install() -> None:
    """Make megatron-core run on CPU tensors in this process. Idempotent; call before building anything.

    Raises RuntimeError where CUDA is available.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError(
            "runtime.cpu.install() was called on a machine with CUDA; it is for CPU-only machines"
        )
    if _installed:
        return
    _installed = True
    # `with torch.device("meta")` knows the factories by identity and collects them on first use; let it have
    # torch's own, or models that transformers loads afterwards are not built on "meta" and come out wrong.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name, replacement in _CUDA.items():
        setattr(torch.cuda, name, replacement)
    for name, replacement in _METHODS.items():
        setattr(torch.Tensor, name, replacement)
    _patch_megatron_rng()


def _on_cpu(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_cpu


def _is_cuda(device) -> bool:
    return str(device).startswith("cuda")


class _Stream:
    """There is one queue on a CPU and it is always in order. A class, as libraries annotate with it."""

    def __init__(self, *args, **kwargs) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...


_tensor_type = torch.Tensor.type


def _type(self, dtype=None, *args, **kwargs):
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    # Megatron sorts parameters into precision groups by these strings.
    return _tensor_type(self).replace("torch.", "torch.cuda.", 1)


_METHODS = {"cuda": lambda self, *args, **kwargs: self, "type": _type}

_CUDA = {
    "current_device": lambda: _CPU,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "current_stream": lambda device=None: _Stream(),
    "Stream": _Stream,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
}


def _patch_megatron_rng() -> None:
    """Megatron's RNG tracker (dropout, recompute) reads and writes the CPU generator instead of CUDA's."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # "apex is not installed" and its kin: reported once, by runtime.parallel
        import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
