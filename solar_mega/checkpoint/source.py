"""What a run starts from: a Hugging Face directory or a Megatron checkpoint, told apart and read without a
GPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solar_mega.errors import UserError


@dataclass(frozen=True)
class Source:
    path: Path
    """Hugging Face directory, or one complete Megatron checkpoint (`checkpoints/step-00000120`)."""

    kind: Literal["hf", "megatron"]
    config: dict[str, Any]
    """config.json of the stored model, at the stored depth."""

    side_files: Path
    """Directory with the tokenizer and generation config that belong to the weights."""

    precision: Literal["fp32", "bf16"]
    """Of the stored weights; exports keep it unless told otherwise."""


def open_source(path: Path, key: str = "model.path", hf_config: Path | None = None) -> Source:
    """A directory of either kind.

    Args:
        hf_config: Hugging Face directory whose config and tokenizer belong to a Megatron checkpoint that
            another program wrote.

    Raises UserError when `path` is neither, naming `key` and what was looked for.
    """
    from solar_mega.artifact.hf import HFDirectory

    if not path.is_dir():
        raise UserError(
            f"{key} = {str(path)!r} is not a directory; give a Hugging Face directory or a checkpoint"
        )
    if (path / "config.json").is_file():
        config = HFDirectory(path).config
        return Source(path, "hf", config, path, _precision(_dtype(config)))
    checkpoint = _checkpoint_in(path)
    if checkpoint is None:
        raise UserError(
            f"{key} = {str(path)!r} holds neither config.json (Hugging Face) nor a complete Megatron "
            "checkpoint (metadata.json, or checkpoints/latest)"
        )
    from solar_mega.checkpoint.run_state import RUN_STATE, read_run_state

    if hf_config is not None and not (checkpoint / RUN_STATE).exists():
        config = HFDirectory(hf_config).config
        return Source(checkpoint, "megatron", config, hf_config, _precision(_dtype(config)))
    state = read_run_state(checkpoint)
    precision = _precision(_dtype(state.hf_config))
    return Source(checkpoint, "megatron", dict(state.hf_config), Path(state.source), precision)


def open_foreign(path: Path) -> Source | None:
    """A Megatron checkpoint that another program wrote, without config; None for anything else."""
    from solar_mega.checkpoint.run_state import RUN_STATE

    if (
        (path / "metadata.json").is_file()
        and not (path / RUN_STATE).exists()
        and not (path / "config.json").is_file()
    ):
        return Source(path, "megatron", {}, path, "fp32")
    return None


def _dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _precision(stored: str) -> Literal["fp32", "bf16"]:
    """The narrower of the two that holds the stored weights exactly; float16 has more digits than bf16."""
    return "bf16" if stored == "bfloat16" else "fp32"


def _checkpoint_in(path: Path) -> Path | None:
    from solar_mega.checkpoint.store import CheckpointStore

    if (path / "metadata.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        if root.is_dir():
            latest = CheckpointStore(root, keep=2).latest()
            if latest is not None:
                return latest
    return None
