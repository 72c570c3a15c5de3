"""NEFTune: uniform noise on the embeddings while training (Jain et al., arXiv 2310.05914).

    x + u · α / sqrt(L · h),   u ~ U(-1, 1) per element,   L the sample's length, h the hidden size

Shapes: s positions of a row, h hidden; with sequence parallelism a rank holds s / tp of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(model: nn.Module, batch: dict[str, Any], alpha: float, seed: int) -> Iterator[None]:
    """Within the block the embeddings of `model` (a pipeline stage, plain or wrapped; nothing happens on
    those without embeddings, and while evaluating) get the noise of `batch`, one packed row.

    The noise depends on `seed` and the row's number alone: the same after a resume and under any layout.
    """
    while not hasattr(model, "pre_process"):
        model = model.module
    if not model.pre_process or not model.training or not alpha:
        yield
        return

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = _noise(batch, output.shape[-1], alpha, seed, output.device)
        if output.shape[0] != noise.shape[0]:  # sequence parallelism: this rank's part of the positions
            noise = noise.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        return output + noise[:, None].to(output.dtype)

    handle = model.embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _noise(batch: dict[str, Any], hidden: int, alpha: float, seed: int, device: torch.device) -> Tensor:
    """[s, h] fp32."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_000_007 + batch["row"])
    bounds = batch["cu_seqlens"].tolist()
    noise = torch.rand(bounds[-1], hidden, generator=generator, device=device) * 2 - 1
    lengths = torch.tensor([end - begin for begin, end in pairwise(bounds)])
    scale = (alpha / (lengths * hidden).sqrt()).repeat_interleave(lengths)
    return noise * scale.to(device)[:, None]
