"""Changing a tensor's dtype on its way from disk to disk, in chunks of bounded memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from solar_mega.artifact.safetensors_format import DTYPES, torch_dtype
from solar_mega.artifact.safetensors_reader import CHUNK_BYTES, SafetensorsReader, as_bytes
from solar_mega.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "fp32": "F32",
    "bf16": "BF16",
    "fp16": "F16",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}
CASTABLE = ("F64", "F32", "F16", "BF16")


def weight_dtype(name: str, key: str = "--dtype") -> str:
    """safetensors' spelling of `fp32`, `bf16` or `fp16`. Raises UserError naming `key` for anything else."""
    if name in _NAMES:
        return _NAMES[name]
    if name in ("F32", "BF16", "F16"):
        return name
    raise UserError(f'{key} = "{name}" is not a dtype for weights; allowed: fp32, bf16, fp16')


def cast_dtype(info_dtype: str, wanted: str | None, name: str) -> str:
    """dtype that tensor `name` gets when weights are asked for as `wanted` (None: as they are).

    Integers and booleans stay. Raises UserError for 8-bit and narrower floats: they are quantised, and their
    scales live in other tensors.
    """
    if wanted is None or info_dtype == wanted:
        return info_dtype
    if info_dtype in CASTABLE:
        return wanted
    if info_dtype.startswith(("F8", "F6", "F4")):
        raise UserError(f"{name} is {info_dtype}, quantised; it cannot become {wanted} without its scales")
    return info_dtype


def cast(before: "Tensor", dtype: str, name: str) -> "Tensor":
    """A tensor's values as `dtype`, rounded to nearest even.

    Raises UserError naming the tensor when a finite value would become infinite.
    """
    import torch

    after = before.to(torch_dtype(dtype))
    if torch.isinf(after).sum() != torch.isinf(before).sum():
        largest = before[torch.isfinite(before)].abs().max().item()
        raise UserError(f"{name} has values up to {largest:g}, which {dtype} cannot hold; use a wider dtype")
    return after


def cast_chunks(reader: SafetensorsReader, name: str, dtype: str) -> Iterator[memoryview]:
    """The bytes of tensor `name` as `dtype`, rounded to nearest even, in the chunks that `raw` would give
    of the result.

    Raises UserError when a finite value would become infinite.
    """
    import torch

    info = reader.info(name)
    source = torch_dtype(info.dtype)
    elements = CHUNK_BYTES * 8 // DTYPES[dtype][0]
    for chunk in reader.raw(name, elements * DTYPES[info.dtype][0] // 8):
        yield as_bytes(cast(torch.frombuffer(bytearray(chunk), dtype=source), dtype, name))
