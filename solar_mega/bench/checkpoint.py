"""A generated checkpoint of any size, streamed to disk: memory does not grow with it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy

from solar_mega.artifact.hf import write_config
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.model.architecture import Architecture
from solar_mega.runtime.console import Progress
from solar_mega.runtime.files import atomic_directory, require_space

_CHUNK = 4 << 20  # elements


class Shape(Protocol):
    """Sizes of a Mistral-shaped decoder, and the number of files it is stored in."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int


def generate(directory: Path, shape: Shape) -> int:
    """Writes bf16 weights, normal with deviation 0.02, and config.json; returns the weights' bytes.

    All tensors differ: one drawn stretch is used over and over with other low bits. Raises UserError when the
    disk is too small.
    """
    config = _config(shape)
    arch = Architecture.from_hf(config)
    shapes = hf_shapes(arch)
    total = 2 * arch.parameters()
    require_space(directory, total + (16 << 20))
    drawn = numpy.random.default_rng(0).standard_normal(_CHUNK, dtype=numpy.float32) * numpy.float32(0.02)
    bits = (drawn.view(numpy.uint32) >> 16).astype(numpy.uint16)
    largest = max(2 * math.prod(size) for size in shapes.values())
    with (
        atomic_directory(directory) as place,
        ShardedWriter(place, total // shape.shards + largest) as writer,
        Progress(total, "bytes", "generate") as line,
    ):
        writer.plan([(name, "BF16", size) for name, size in shapes.items()])
        for number, name in enumerate(shapes):
            writer.write_chunks(name, _chunks(bits, writer.infos[name].elements, number))
            line.advance(writer.infos[name].nbytes)
        write_config(place, config)
    return total


def _chunks(bits: numpy.ndarray, elements: int, number: int) -> Iterator[memoryview]:
    """`elements` bf16 numbers as bytes, other ones for each tensor and each stretch of it."""
    for part, start in enumerate(range(0, elements, _CHUNK)):
        # Seven bits of mantissa change; the rest of the number, its size included, does not.
        changed = numpy.roll(bits, 97 * number + part)[: elements - start] ^ numpy.uint16(
            (31 * number + part) % 127 + 1
        )
        yield memoryview(changed.view(numpy.uint8))


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
