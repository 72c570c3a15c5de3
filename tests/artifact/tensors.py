"""Tensors and files that the tests of safetensors directories are made of."""

import json
import struct

import torch

from solar_mega.artifact.safetensors_format import (
    dtype_name,
    tensor_bytes,
)


def random_tensor(shape, dtype, seed=0):
    bits = torch.randint(
        0, 256, (tensor_bytes(dtype_name(dtype), shape),), generator=torch.Generator().manual_seed(seed)
    )
    if dtype == torch.bool:
        bits %= 2
    return bits.to(torch.uint8).view(dtype).view(shape)


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def write_raw(path, header, data=b""):
    """A file with exactly this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
