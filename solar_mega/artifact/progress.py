"""How long-running functions of this package report their progress, and the silence they default to."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advances(Protocol):
    """What `runtime.console.Progress` gives inside its `with` block."""

    def advance(self, n: int) -> None: ...


ProgressFactory = Callable[[int, str, str], AbstractContextManager[Advances]]
"""(total, unit, label) -> context manager, as `runtime.console.Progress`. This package counts bytes."""


class _Silent:
    def advance(self, n: int) -> None:
        pass


def silent(total: int, unit: str, label: str) -> AbstractContextManager[Advances]:
    """Shows nothing."""
    return nullcontext(_Silent())
