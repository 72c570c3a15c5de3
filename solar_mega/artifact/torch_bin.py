"""PyTorch's pickled checkpoints (pytorch_model*.bin), read like safetensors: by offset, nothing executed.

`torch.save` writes a zip archive without compression: a small pickle of names, shapes and strides, and every
storage in one stretch. The pickle is read by torch's weights-only unpickler, which builds tensors and refuses
everything else, and without the storages; the elements are then read, or moved, from where they lie.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solar_mega.artifact.safetensors_format import TensorInfo, dtype_name
from solar_mega.errors import Problems

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
_REMEDY = "save it once more, with the program that wrote it or torch >= 1.6"


def read_pickle(path: Path, problems: Problems) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes; two may share them. What is wrong goes to
    `problems`, each text starting with the file's name."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def wrong(text: str) -> list[TensorInfo]:
        problems.add(f"{path.name}: {text}")
        return []

    try:
        if not zipfile.is_zipfile(path):
            if path.stat().st_size and _is_legacy(path):
                return wrong(f"the format of torch before 1.6, which is not read; {_REMEDY}")
            return wrong(f"truncated, or not a PyTorch checkpoint ({path.stat().st_size} bytes)")
        with FakeTensorMode():
            content = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        return wrong(f"missing or unreadable ({error.strerror})")
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        return wrong(f"not tensors alone, or damaged, and not opened: {_last_line(error)}")
    if not isinstance(content, Mapping):
        return wrong(f"holds a {type(content).__name__}, not names and tensors")
    infos = []
    for name, tensor in content.items():
        found = _place(name, tensor, path)
        if isinstance(found, TensorInfo):
            infos.append(found)
        else:
            wrong(f"{name}: {found}")
    return sorted(infos, key=lambda info: (info.offset, info.nbytes))


def _place(name: Any, tensor: Any, path: Path) -> TensorInfo | str:
    """Where a tensor lies in the file, or why it cannot be read from there."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, not a tensor; the file must hold the model's state dict alone"
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        return "not stored row by row; make it contiguous and save it once more"
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        return f"its place in the file is not known to torch {torch.__version__}; {_REMEDY}"
    width = tensor.element_size()
    try:
        dtype = dtype_name(tensor.dtype)
    except ValueError as error:
        return str(error)
    offset, nbytes = start + tensor.storage_offset() * width, tensor.numel() * width
    if offset + nbytes > path.stat().st_size:
        return "lies beyond the end of the file, which is truncated"
    return TensorInfo(name, dtype, tuple(tensor.shape), path.name, offset, nbytes)


def _is_legacy(path: Path) -> bool:
    """The old format starts with a pickle of a magic number."""
    with open(path, "rb") as stream:
        return stream.read(2)[:1] == b"\x80"


def _last_line(error: Exception) -> str:
    """torch's advice on weights-only loading is a page; what it met stands in one of its lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Unsupported" in line or "GLOBAL" in line or "WeightsUnpickler" in line]
    return f"{type(error).__name__}: {(told or lines or [''])[0]}"[:300]
