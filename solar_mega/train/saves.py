"""A run's checkpoints as the loop asks for them: what is saved, and what happens when saving fails."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from solar_mega.checkpoint.run_state import RunState
from solar_mega.checkpoint.saver import Saver
from solar_mega.errors import UserError
from solar_mega.runtime.console import say


class RunSaves:
    """with RunSaves(...) as saves: saves.save(step); saves.poll(); saves.save_last(step)

    An asynchronous save that is still being written when the block ends with an error of the user's (which
    all ranks raise) is completed first; with any other it is given up.
    """

    def __init__(
        self,
        saver: Saver,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        state: Callable[[int], RunState],
        on_failure: Literal["stop", "continue"],
    ) -> None:
        """`state(step)`: what goes into the checkpoint beside tensors and random generators."""
        self.saver, self.chunks, self.optimizer = saver, chunks, optimizer
        self.state, self.on_failure = state, on_failure

    def save(self, step: int) -> None:
        """Saves, or begins to. A failure is fatal or reported, as configured; all ranks agree on it."""
        self._forgiving(self.saver.wait)
        self._forgiving(lambda: self.saver.save(self.chunks, self.optimizer, self.state(step)))

    def save_last(self, step: int) -> None:
        """Saves and waits until it is complete. A failure is fatal: nothing follows that could mend it."""
        self._forgiving(self.saver.wait)
        self.saver.save(self.chunks, self.optimizer, self.state(step))
        self.saver.wait()

    def poll(self) -> None:
        """Commits what has been written meanwhile."""
        if self.saver.pending is not None:
            self._forgiving(self.saver.poll)

    def _forgiving(self, action: Callable[[], Path | None]) -> None:
        try:
            action()
        except UserError as error:
            if self.on_failure == "stop":
                raise
            say(f'{error}\ncheckpoint.on_failure = "continue": the run goes on without this checkpoint')

    def __enter__(self) -> "RunSaves":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.saver.close(abort=kind is not None and not issubclass(kind, UserError))
