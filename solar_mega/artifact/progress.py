"""How long-running functions of this package report their progress, and the silence they default to."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advances(Protocol):
    """What `runtime.console.Progress` gives inside its `with` block."""

    def advance(self, n: int) -> None: ...


class ProgressFactory(Protocol):
    """`runtime.console.Progress`, or something that is called like it. This package counts bytes; `initial`
    of them were done by an earlier attempt."""

    def __call__(
        self, total: int, unit: str, label: str, initial: int = 0
    ) -> AbstractContextManager[Advances]: ...


class _Silent:
    def advance(self, n: int) -> None:
        pass


def silent(total: int, unit: str, label: str, initial: int = 0) -> AbstractContextManager[Advances]:
    """Shows nothing."""
    return nullcontext(_Silent())
