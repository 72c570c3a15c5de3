"""The safetensors format: dtypes, file headers and the shard index, each parsed with every claim checked.

A file is `length (8 bytes, little endian) | JSON header | data`; the header gives each tensor's dtype, shape
and [begin, end) inside the data, which the tensors cover without gap or overlap
(https://huggingface.co/docs/safetensors). A directory holds `model.safetensors`, or shards and
`model.safetensors.index.json`; one that has neither may hold PyTorch's pickles instead (`torch_bin`).
"""

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solar_mega.errors import Problems, UserError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the safetensors library's own limit, bytes

# safetensors dtype -> (bits per element, torch's name). Types without a torch name are moved, never decoded.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are. `offset` counts from the start of `file`, header included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor: elements x bits / 8. Raises ValueError for an unknown dtype or a partial byte."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is unknown; known are {', '.join(DTYPES)}")
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's dtype for a safetensors spelling. Raises UserError where torch has none."""
    import torch

    name = DTYPES[dtype][1]
    if name is None or not hasattr(torch, name):
        raise UserError(
            f"torch {torch.__version__} cannot hold safetensors dtype {dtype}; it can only be moved"
        )
    return getattr(torch, name)


def dtype_name(dtype: "torch.dtype") -> str:
    """safetensors spelling of a torch dtype. Raises ValueError where there is none."""
    torch_name = str(dtype).removeprefix("torch.")
    for name, (_, candidate) in DTYPES.items():
        if candidate == torch_name:
            return name
    raise ValueError(f"safetensors has no name for {dtype}")


def read_header(path: Path, problems: Problems) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes. What is wrong goes to `problems`, each text
    starting with the file's name; tensors whose own entry is sound are returned all the same."""

    def wrong(text: str) -> list[TensorInfo]:
        problems.add(f"{path.name}: {text}")
        return []

    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if size < 8 or length == 0 and size >= 8:
                return wrong(f"not a finished safetensors file ({size} bytes, no header)")
            if length > MAX_HEADER or 8 + length > size:
                return wrong(f"truncated or not safetensors: a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        return wrong(f"missing or unreadable ({error.strerror})")
    except (ValueError, RecursionError) as error:
        return wrong(f"the header is not valid ({error})")
    if not isinstance(header, dict):
        return wrong("the header is not a JSON object")

    infos, data = [], 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        text = _entry_problem(entry)
        if text:
            wrong(f"{name}: {text}")
        else:
            begin, end = entry["data_offsets"]
            infos.append(
                TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path.name, data + begin, end - begin)
            )
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    if len(infos) == len(header.keys() - {"__metadata__"}):
        _check_layout(infos, data, size, wrong)
    return infos


def _check_layout(infos: list[TensorInfo], data: int, size: int, wrong: Callable[[str], Any]) -> None:
    """Every byte of the data belongs to exactly one tensor, and the file ends where the last one does."""
    at = data
    for info in infos:
        if info.offset != at:
            what = "overlaps the tensor before it" if info.offset < at else "leaves a gap before it"
            wrong(f"{info.name} {what} ({abs(info.offset - at)} bytes)")
        at = max(at, info.offset + info.nbytes)
    if size < at:
        cut = next(info.name for info in infos if info.offset + info.nbytes > size)
        wrong(f"truncated: {size} bytes, the header needs {at}; the first tensor cut is {cut}")
    elif size > at:
        wrong(f"{size - at} bytes after the last tensor")


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "the entry lacks dtype, shape or data_offsets"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"shape {shape} or data_offsets {offsets} are not lists of sizes"
    try:
        needed = tensor_bytes(str(entry["dtype"]), shape)
    except ValueError as error:
        return str(error)
    if offsets[1] - offsets[0] != needed:
        return f"{entry['dtype']} {shape} takes {needed} bytes, its offsets span {offsets[1] - offsets[0]}"
    return None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 62 for x in value)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{twice}" appears twice')
    return result


def index_name(directory: Path) -> str:
    """The name of the directory's index, were there one: safetensors where any are, else PyTorch's."""
    from solar_mega.artifact import torch_bin

    if (directory / INDEX).exists() or (directory / SINGLE).exists():
        return INDEX
    pickled = any((directory / name).exists() for name in (torch_bin.INDEX, torch_bin.SINGLE))
    return torch_bin.INDEX if pickled else INDEX


def read_index(directory: Path, problems: Problems) -> tuple[list[str], dict[str, str] | None]:
    """Files to read, and the index's {tensor: file} where there is one."""
    name = index_name(directory)
    index, single = directory / name, name.removesuffix(".index.json")
    if not index.exists():
        if not (directory / single).exists():
            problems.add(_nothing_found(directory))
            return [], None
        return [single], None
    if (directory / single).exists():
        problems.add(f"it has both {single} and {name}; remove the one that is not meant")
    try:
        content = json.loads(index.read_text("utf-8"), object_pairs_hook=_refuse_duplicates)
        listed = content["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError("weight_map must give a file for every tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.add(f"{name} is not a valid index ({type(error).__name__}: {error})")
        return [], None
    files = sorted(set(listed.values()))
    outside = [file for file in files if os.path.basename(file) != file or file in ("", ".", "..")]
    for file in outside:
        problems.add(f'{name} names the file "{file}"; shards lie beside the index')
    if not files:
        problems.add(f"{name} lists no tensors")
    return [file for file in files if file not in outside], listed


def _nothing_found(directory: Path) -> str:
    supported = f"supported are {SINGLE}, or shards with {INDEX}"
    names = os.listdir(directory) if directory.is_dir() else []
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"its weights are PyTorch pickles of unknown names; {supported}, pytorch_model.bin, or its "
            "shards with pytorch_model.bin.index.json"
        )
    if any(name.endswith(".safetensors") for name in names):
        return f"it has .safetensors files but no {INDEX}; {supported}"
    return f"it holds no weights; {supported}"
