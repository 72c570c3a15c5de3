"""Every random generator of this process, taken and put back.

Megatron keeps named streams beside torch's own (dropout inside a tensor-parallel region differs between its
ranks, outside it must not); its tracker holds them and they are part of the state.
"""

import hashlib
import random
from typing import Any

import numpy
import torch


def capture() -> dict[str, Any]:
    """State of Python's, NumPy's, torch's, CUDA's and Megatron's generators: plain containers and CPU
    tensors.
    """
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    version, internal, cached = random.getstate()
    state = {
        "python": [version, list(internal), cached],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "megatron": dict(_tracker().get_states()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Puts back what `capture` returned. A state without CUDA (from a CPU run) leaves CUDA's generator
    alone.
    """
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    _tracker().set_states(dict(state["megatron"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def reseed(seed: int, step: int) -> None:
    """Fresh streams for a run that goes on at `step` under another layout, where the old streams have no
    owner.

    The same seed and step give the same streams; step 0's are not repeated.
    """
    from megatron.core import tensor_parallel

    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    value = int.from_bytes(digest[:4], "big") >> 1  # Megatron adds small offsets to it; NumPy takes 32 bits
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


def _tracker():
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()
