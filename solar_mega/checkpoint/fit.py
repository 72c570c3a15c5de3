"""Does a checkpoint fit the model at hand, and can it be read? Everything a person can mend, as
UserErrors.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from solar_mega.checkpoint.optimizer_kinds import kind_of, optimizer_kind
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.files import DISK_ERRORS

_SHOWN = 12
# What Megatron, torch and pickle raise about files that are not what they were. torch's CheckpointException
# is a BaseException.
_DAMAGE = (
    CheckpointException,
    CheckpointingException,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    ImportError,
)


def sharded_tensors(contents: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Every piece of a tensor that a sharded state dict asks for or offers."""
    for entry in nested_values(contents):
        if isinstance(entry, ShardedTensorFactory):
            yield from (
                part for part in nested_values({"": entry.build()}) if isinstance(part, ShardedTensor)
            )
        elif isinstance(entry, ShardedTensor):
            yield entry


def save_failure(path: Path, error: BaseException) -> str:
    """What to tell the user when writing `path` raised `error`."""
    reason = str(_first(error)) or "rank 0 says why"
    # The errors of writing processes arrive as text inside other errors.
    number = re.search(r"\[Errno (\d+)\]", reason)
    if number and int(number[1]) in DISK_ERRORS:
        reason = f"{DISK_ERRORS[int(number[1])]} ({reason})"
    return f"saving {path} failed: {reason}; the unfinished checkpoint was removed, older ones are untouched"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what Megatron, torch and pickle raise about a damaged checkpoint into a UserError naming it."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"checkpoint {path} is damaged: {_first_line(error)}") from error


def _first(error: BaseException) -> BaseException:
    """torch collects the ranks' errors in one, on the coordinator only."""
    if isinstance(error, CheckpointException):
        return next((failure[0] for failure in error.failures.values()), RuntimeError(""))
    return error


def _first_line(error: BaseException) -> str:
    cause = _first(error)
    text = str(cause).strip() or "rank 0 says why"
    return f"{type(cause).__name__}: {text.splitlines()[0]}"[:400]


def check_depth(path: Path, modules: list[nn.Module], layer_map: LayerMap) -> None:
    layers = modules[0].config.num_layers
    if len(layer_map) != layers:
        raise UserError(
            f'checkpoint {path} gives {len(layer_map)} layers through layer map "{layer_map}"; '
            f"the model has {layers}"
        )


def check_optimizer(
    path: Path, optimizer: MegatronOptimizer, stored: dict[str, ShardedTensor], metadata: dict
) -> None:
    """`stored`: the checkpoint's tensors, without data."""
    saved, needed = optimizer_kind(stored), kind_of(optimizer)
    sharding = metadata["distrib_optim_sharding_type"]
    if saved is None:
        raise UserError(
            f"checkpoint {path} holds weights only; a run cannot resume from it without optimizer states"
        )
    if sharding != "fully_reshardable":
        raise UserError(
            f"checkpoint {path} has optimizer states of type {sharding}; supported: fully_reshardable"
        )
    held = {t.dtype for key, t in stored.items() if key.startswith("decoder.layers.")}
    wanted = torch.bfloat16 if optimizer.config.bf16 else torch.float32
    if saved != needed and held != {wanted}:
        spelled = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
        raise UserError(
            f"checkpoint {path} holds weights in {spelled}, this run trains "
            f"{str(wanted).removeprefix('torch.')}: set train.precision as it was"
        )


def check_tensors(path: Path, contents: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    problems = Problems()
    for tensor in {tensor.key: tensor for tensor in sharded_tensors(contents)}.values():
        held = shapes.get(tensor.key)
        if held is None:
            problems.add(f"{tensor.key} is missing")
        elif held != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            problems.add(f"{tensor.key} has shape {list(held)}; the model needs {list(tensor.global_shape)}")
    if len(problems.texts) > _SHOWN:
        problems.texts[_SHOWN:] = [f"... and {len(problems.texts) - _SHOWN} more"]
    problems.raise_if_any(f"checkpoint {path} does not fit the model")
