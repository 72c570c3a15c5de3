"""A hash of a model's weights that does not depend on the form they are stored in.

Each tensor in its Hugging Face form is hashed on its own, then the sorted list of names, dtypes, shapes and
hashes: a model has the same hash as safetensors in any number of shards and as a Megatron checkpoint on any
layout. A conversion there and back that changed nothing shows it without a third copy to compare.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TensorDigest = tuple[str, Sequence[int], str]
"""safetensors dtype, shape, SHA-256 of the bytes."""


def tensor_digest(tensor: "torch.Tensor") -> TensorDigest:
    """Of one tensor; fits in JSON."""
    from solar_mega.artifact.safetensors_format import dtype_name
    from solar_mega.artifact.safetensors_reader import as_bytes

    return dtype_name(tensor.dtype), list(tensor.shape), hashlib.sha256(as_bytes(tensor)).hexdigest()


def weights_hash(tensors: Mapping[str, TensorDigest]) -> str:
    """`sha256:` of a whole model, from {Hugging Face name: digest}."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, digest = tensors[name]
        total.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"
