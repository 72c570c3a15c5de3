"""Random weights that do not depend on the layout: every tensor is drawn from its own name.

So a model from scratch starts the same on one process and on TP2 x PP2, and goes through the same loading
path as a pretrained one.
"""

import hashlib
import math

import torch
from torch import Tensor

from solar_mega.artifact.safetensors_format import TensorInfo, tensor_bytes
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.model.architecture import Architecture


class RandomWeights:
    """A TensorSource: norms are 1, biases 0, matrices N(0, std^2), projections into the residual stream
    std / sqrt(2 layers).

    The scaling of those projections keeps the residual stream's variance independent of depth (GPT-2).
    """

    def __init__(self, arch: Architecture, seed: int, std: float | None = None) -> None:
        self.arch, self.seed = arch, seed
        self.std = arch.init_std if std is None else std
        self.shapes = hf_shapes(arch)
        self._last: tuple[str, Tensor] | None = None

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of a tensor, which is nowhere on disk."""
        shape = self.shapes[name]
        return TensorInfo(name, "F32", shape, "", 0, tensor_bytes("F32", shape))

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        return self._whole(name).narrow(dim, start, stop - start)

    def _whole(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._draw(name))
        return self._last[1]

    def _draw(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = self.std / math.sqrt(2 * self.arch.num_layers) if into_residual else self.std
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shape).normal_(0.0, std, generator=generator)
