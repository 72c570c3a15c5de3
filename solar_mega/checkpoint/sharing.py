"""Several processes writing one directory: torchrun's ranks share the units of work, rank 0 begins and ends.

A process on its own needs no process group for any of this, and makes none.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.partial import Partial, resumable_directory

T = TypeVar("T")


def alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextlib.contextmanager
def world() -> Iterator[None]:
    """The process group of all ranks, where there is more than one."""
    if alone():
        yield
        return
    ranks.join_world()
    try:
        yield
        ranks.gather(None)  # nobody takes its sockets away while others still finish
    finally:
        ranks.stop()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Collective: the block ends well on all ranks, or raises on all. No collectives inside."""
    if alone():
        yield
        return
    with ranks.together():
        yield


def my_share(units: Sequence[T]) -> list[T]:
    """This rank's part of the units; every unit is some rank's."""
    return list(units)[ranks.rank() :: ranks.world_size()]


@contextlib.contextmanager
def shared_directory(path: Path, plan: Mapping[str, Any]) -> Iterator[Partial]:
    """Collective `resumable_directory`: all ranks get the directory, rank 0 makes it and gives it its name.

    Errors inside must reach all ranks: wrap the work in `together`.
    """
    if alone():
        with resumable_directory(path, plan) as partial:
            yield partial
        return
    with contextlib.ExitStack() as stack:
        place = None
        with ranks.together():
            if ranks.is_main():
                place = str(stack.enter_context(resumable_directory(path, plan)).path)
        partial = Partial(Path(ranks.gather(place)[0]))
        with ranks.together():
            if not ranks.is_main():
                stack.enter_context(partial.held())
        yield partial
