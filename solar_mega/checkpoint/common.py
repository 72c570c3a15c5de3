"""common.pt: what a Megatron checkpoint holds beside its tensors, read without running anything in it."""

import argparse
import os
import pathlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from solar_mega.errors import UserError

COMMON = "common.pt"
_OF_THE_OPTIMIZER = ("optimizer", "opt_param_scheduler")


def read_common(path: Path) -> dict[str, Any]:
    """common.pt of the checkpoint in `path`: numbers, texts, containers, tensors, Megatron-LM's arguments.

    Raises UserError when it is missing or damaged, or wants anything else.
    """
    file = Path(path) / COMMON
    try:
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.Path]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error)[:200]
        )
        raise UserError(
            f"{file} is refused: it holds more than plain values and tensors ({reason})"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise UserError(f"checkpoint {path} is damaged: {file} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} is damaged: {file} holds a {type(content).__name__}")
    return content


def patched_common(source: Path, target: Path, layers: int, optimizer: bool) -> None:
    """Writes the source's common.pt into the directory `target` for `layers` layers; without the optimizer's
    part when `optimizer` is False. A file that needs no change is linked or copied."""
    common = read_common(source)
    args = common.get("args")
    changes = False
    if isinstance(args, argparse.Namespace) and getattr(args, "num_layers", layers) != layers:
        # Megatron-LM compares these with its command line before it loads anything.
        args.num_layers = layers
        changes = True
    if not optimizer:
        changes |= any(common.pop(key, None) is not None for key in _OF_THE_OPTIMIZER)
    if changes:
        torch.save(common, target / COMMON)
        return
    try:
        os.link(source / COMMON, target / COMMON)
    except OSError:
        shutil.copyfile(source / COMMON, target / COMMON)
