"""What every streaming route does with a tensor in memory: cast it, and take it for a source of rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from solar_mega.artifact.cast import cast
from solar_mega.artifact.safetensors_format import dtype_name
from solar_mega.checkpoint.names import Rule, hf_names, hf_shapes
from solar_mega.model.architecture import Architecture


def cast_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`artifact.cast.cast` with torch's dtype; the tensor itself where nothing changes."""
    return tensor if tensor.dtype == dtype else cast(tensor, dtype_name(dtype), name)


class Loaded:
    """Whole tensors in memory as a source of rows."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)


class Shapes:
    """The shapes of an architecture's tensors as a source of rows without contents."""

    def __init__(self, arch: Architecture) -> None:
        self.shapes = hf_shapes(arch)

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> Tensor:
        shape = list(self.shapes[name])
        shape[dim] = stop - start
        return torch.empty(shape, device="meta")


def whole_shape(rule: Rule, arch: Architecture) -> torch.Size:
    """Shape of a parameter as one rank alone would hold it."""
    return rule.packing.read(Shapes(arch), hf_names(rule, 0), arch, 0, 1).shape


def pieces_of(
    rule: Rule, shard: Tensor, whole: torch.Size, t: int, tp: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(offsets in the whole parameter, part of the shard): what Megatron stores of rank t's shard.

    A gated pair is one tensor [2f, h], gate above up, and a shard holds a stretch of each.
    """
    if shard.shape == whole:
        if t == 0:
            yield [0] * shard.dim(), shard
        return
    dim = next(i for i, (part, full) in enumerate(zip(shard.shape, whole, strict=True)) if part != full)
    halves = shard.chunk(2, dim) if rule.packing.gated else (shard,)
    for number, piece in enumerate(halves):
        offsets = [0] * shard.dim()
        offsets[dim] = number * (whole[dim] // len(halves)) + t * piece.shape[dim]
        yield offsets, piece


def owns_memory(tensor: Tensor) -> bool:
    """Whether the tensor is all of its memory. torch.save writes all of it, whatever the tensor shows."""
    return (
        tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
    )
