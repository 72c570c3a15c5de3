"""Where a run's metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, when asked for."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from solar_mega.errors import Problems, UserError

_NOT_CURVES = ("step", "tokens", "flops")


class Sink(Protocol):
    """Takes the rows of metrics.jsonl: `step` and whatever was measured there."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed(tensorboard: bool, wandb: bool, problems: Problems) -> None:
    """Adds a problem for each tracker that is asked for and not installed."""
    for key, asked, package in (
        ("output.tensorboard", tensorboard, "tensorboard"),
        ("output.wandb", wandb, "wandb"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            problems.add(f"{key} is set, but {package} is not installed: pip install {package}, or unset it")


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class TensorBoard:
    """Event files in `<output.dir>/tensorboard`. A resumed run goes on after `first_step`; what an earlier
    one wrote beyond it is hidden."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _curves(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, kept in `<output.dir>/wandb` and, unless offline, sent. The run's directory
    names it, so a resumed run goes on in the same one.

    Raises UserError when there is no connection or no login.
    """

    def __init__(self, directory: Path, project: str, mode: str | None, config: str) -> None:
        """`mode` None: as the environment variable WANDB_MODE says, else online."""
        import hashlib

        import wandb

        directory, mode = directory.absolute(), mode or os.environ.get("WANDB_MODE") or "online"
        try:
            self.run = wandb.init(
                project=project,
                name=directory.name,
                id=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=str(directory),
                config={"toml": config},
            )
        except wandb.errors.Error as error:
            raise UserError(
                f'output.wandb = "{project}", mode {mode}: {str(error).strip().splitlines()[0]} Or set '
                'output.wandb_mode = "offline", and send the run later (wandb sync)'
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        self.run.log({**_curves(record), "step": record["step"]}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _curves(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that make a curve; what is not finite has no place in one."""
    numbers = {
        name: float(value)
        for name, value in record.items()
        if name not in _NOT_CURVES and isinstance(value, int | float) and math.isfinite(value)
    }
    return numbers
