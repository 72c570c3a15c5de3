"""What the tensors of a target layer are made of, on every route alike.

A layer map defines the tensors of the grown model in the dtype of the source, by Hugging Face name:

    copy     T = S                                     bytes are moved, nothing is decoded
    mean     T = (S_a + S_b + ...) / k                 in the order of the layers
    scale    T = s * T                                 o_proj and down_proj only; 0 gives zeros
    noise    T = T + sd * Z(seed, layer, name)         matrices only

computed in fp32 (fp64 for fp64 weights) and rounded once, element by element: so a rank that holds some rows
or columns gets the same bits as one that holds them all. Changing the dtype is a step of its own, afterwards.

Z is drawn row by row, each row from a counter of its own (Philox 4x64; Salmon et al., SC'11), keyed by the
seed, the target layer and the tensor's name inside the layer.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from solar_mega.artifact.cast import CASTABLE, cast
from solar_mega.artifact.hf import layer_name, split_layer
from solar_mega.artifact.safetensors_reader import CHUNK_BYTES, as_bytes
from solar_mega.depth.layer_map import KEY, LayerMap
from solar_mega.errors import Problems, UserError

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = ("o_proj", "down_proj")
"""Name parts of the matrices that write into the residual stream."""


class Reader(Protocol):
    """A checkpoint by tensor name; `info` gives dtype (safetensors spelling) and shape."""

    def info(self, name: str) -> Any: ...

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> "Tensor": ...


@dataclass(frozen=True)
class Making:
    """How one tensor of a target layer is made."""

    target: int
    suffix: str
    """Name inside the layer, such as `mlp.down_proj.weight`."""

    origins: tuple[int, ...]
    """Source layers: one is copied, several are averaged."""

    scale: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0

    @property
    def plain(self) -> bool:
        """A copy: the target's bytes are the source's."""
        return len(self.origins) == 1 and self.scale == 1 and self.noise == 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Full names of the source tensors."""
        return tuple(layer_name(layer, self.suffix) for layer in self.origins)

    @property
    def name(self) -> str:
        return layer_name(self.target, self.suffix)


def making(layer_map: LayerMap, target: int, suffix: str, dimensions: int) -> Making:
    """How tensor `suffix` (of so many dimensions) of target layer `target` is made. The layer must have
    origins."""
    modifier = layer_map.modifiers[target]
    scale = 1.0
    for output in OUTPUTS:
        if output in suffix.split("."):
            scale = getattr(modifier, output)
    noise = modifier.noise if dimensions >= 2 else 0.0
    seed = modifier.noise_seed if noise else 0
    return Making(target, suffix, layer_map.sources_of(target), scale, noise, seed)


def combine(recipe: Making, parts: Sequence["Tensor"], noise: "Tensor | None") -> "Tensor":
    """The target's elements from the same elements of each origin, and of `noise_rows`; dtype as the parts'.

    `parts` may be in any layout that all of them, and `noise`, share.
    """
    import torch

    dtype = parts[0].dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if recipe.scale == 0:
        value = torch.zeros_like(parts[0], dtype=exact)
    else:
        value = parts[0].to(exact)
        for part in parts[1:]:
            value = value + part.to(exact)
        if len(parts) > 1:
            value = value / len(parts)
        if recipe.scale != 1:
            value = value * recipe.scale
    if noise is not None:
        value = value + noise.to(value)
    return value.to(dtype)


def noise_rows(recipe: Making, shape: Sequence[int], start: int, stop: int, dim: int = 0) -> "Tensor":
    """Indices [start, stop) along `dim` of the noise of a tensor of `shape`, standard deviation applied.
    fp32."""
    import numpy
    import torch

    digest = hashlib.sha256(f"{recipe.noise_seed}:{recipe.target}:{recipe.suffix}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    rows = range(start, stop) if dim == 0 else range(shape[0])
    drawn = numpy.empty((len(rows), math.prod(shape[1:])), dtype=numpy.float32)
    for i, row in enumerate(rows):
        # A row owns 2^64 steps of the counter; it needs no more than a few per element.
        stream = numpy.random.Generator(numpy.random.Philox(key=key, counter=row << 64))
        stream.standard_normal(out=drawn[i], dtype=numpy.float32)
    values = torch.from_numpy(drawn).view(len(rows), *shape[1:])
    return (values if dim == 0 else values.narrow(dim, start, stop - start)) * recipe.noise


class MappedSource:
    """The grown model's tensors by their names, read from a checkpoint at the source's depth.

    Like the reader it wraps, it reads the rows asked for and no others (twice for a mean of two).
    """

    def __init__(self, reader: Reader, layer_map: LayerMap) -> None:
        self.reader = reader
        self.layer_map = layer_map

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> "Tensor":
        """Indices [start, stop) along `dim` of the grown model's tensor `name`."""
        target, suffix = split_layer(name)
        if target is None:
            return self.reader.read_rows(name, start, stop, dim)
        origins = self.layer_map.sources_of(target)
        if len(origins) == 1 and not self.layer_map.modifiers[target].changes_weights:
            return self.reader.read_rows(layer_name(origins[0], suffix), start, stop, dim)
        info = self.reader.info(layer_name(origins[0], suffix))
        recipe = making(self.layer_map, target, suffix, len(info.shape))
        return read_made(self.reader, recipe, start, stop, dim)


def read_made(reader: Reader, recipe: Making, start: int, stop: int, dim: int = 0) -> "Tensor":
    """Indices [start, stop) along `dim` of the tensor that `recipe` makes. What is scaled by 0 is not
    read."""
    import torch

    if recipe.plain:
        return reader.read_rows(recipe.sources[0], start, stop, dim)
    info = check_made(reader, recipe)
    noise = noise_rows(recipe, info.shape, start, stop, dim) if recipe.noise else None
    if recipe.scale == 0:
        from solar_mega.artifact.safetensors_format import torch_dtype

        shape = (*info.shape[:dim], stop - start, *info.shape[dim + 1 :])
        parts = [torch.zeros(shape, dtype=torch_dtype(info.dtype))]
    else:
        parts = [reader.read_rows(name, start, stop, dim) for name in recipe.sources]
    return combine(recipe, parts, noise)


def check_made(reader: Reader, recipe: Making) -> Any:
    """The info of a tensor to be made, after the origins were compared: same dtype, a float, same shape.

    Raises UserError when they differ or the dtype is not one that can be computed with.
    """
    infos = [reader.info(name) for name in recipe.sources]
    for name, info in zip(recipe.sources[1:], infos[1:], strict=True):
        if (info.dtype, info.shape) != (infos[0].dtype, infos[0].shape):
            raise UserError(
                f"{recipe.name} is a mean, but {name} is {info.dtype} {list(info.shape)} and "
                f"{recipe.sources[0]} is {infos[0].dtype} {list(infos[0].shape)}"
            )
    if infos[0].dtype not in CASTABLE:
        raise UserError(
            f"{recipe.name} is {infos[0].dtype}; the layer map averages, scales or adds noise to it, which "
            f"needs one of {', '.join(CASTABLE)}"
        )
    return infos[0]


def made_chunks(reader: Reader, recipe: Making, dtype: str) -> Iterator[memoryview]:
    """The bytes of the tensor that `recipe` makes, as `dtype`, in chunks of CHUNK_BYTES, the last one
    shorter: those that `SafetensorsReader.raw` gives of the result. Memory does not grow with the tensor.

    Raises UserError as `check_made`, and when a finite value does not fit `dtype`.
    """
    info = check_made(reader, recipe)
    rows = info.shape[0] if info.shape else 1
    step = max(1, CHUNK_BYTES * rows // max(1, info.nbytes))
    pending = bytearray()
    for start in range(0, rows, step):
        made = read_made(reader, recipe, start, min(start + step, rows))
        pending += as_bytes(cast(made, dtype, recipe.name))
        while len(pending) >= CHUNK_BYTES:
            yield memoryview(bytes(pending[:CHUNK_BYTES]))
            del pending[:CHUNK_BYTES]
    if pending:
        yield memoryview(bytes(pending))


def check_recipe(layer_map: LayerMap, suffixes: dict[int, set[str]], where: str) -> None:
    """Can the map be carried out on layers with these tensors ({source layer: names inside it})?

    Raises UserError: fresh layers, a mean of layers with different tensors, a scale with nothing to scale.
    """
    problems = Problems()
    if layer_map.fresh:
        problems.add(
            f"target layers {list(layer_map.fresh)[:8]} are fresh, and {where} has no weights for them; "
            "use a map that gives every layer an origin"
        )
    for target, modifier in enumerate(layer_map.modifiers):
        origins = layer_map.sources_of(target)
        kinds = [suffixes.get(layer, set()) for layer in origins]
        if any(kind != kinds[0] for kind in kinds):
            problems.add(f"target layer {target} is the mean of layers {list(origins)}, which differ in kind")
        for output in OUTPUTS if kinds else ():
            found = any(output in suffix.split(".") for suffix in kinds[0])
            if getattr(modifier, output) != 1 and not found:
                problems.add(f"target layer {target} scales {output}, which layer {origins[0]} does not have")
    del problems.texts[12:]
    problems.raise_if_any(f'{KEY} = "{layer_map.spelling[:60]}"')
