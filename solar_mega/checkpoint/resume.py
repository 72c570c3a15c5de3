"""Which checkpoint a run goes on from, when the newest one may be damaged.

A damaged checkpoint is an error that names the file. Falling back to the one before it loses work, so it
happens only when the configuration says so.
"""

from collections.abc import Callable
from pathlib import Path

from solar_mega.checkpoint.run_state import check_files, check_hashes, read_run_state
from solar_mega.checkpoint.store import CheckpointStore
from solar_mega.errors import UserError
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say

_HINT = (
    "set checkpoint.fallback = true to set it aside and go on from the one before it, or restore the file "
    "from a copy"
)


def newest_whole(store: CheckpointStore, fallback: bool) -> Path | None:
    """The checkpoint that `latest` names, if all its files are there at their sizes; with `fallback`, else
    the newest one before it of which that is true. None where the run has no checkpoint. Changes nothing.

    Raises UserError naming what is damaged, where falling back is not asked for or leads to nothing.
    """
    latest = store.latest()
    return None if latest is None else _first_sound(store, latest, fallback, _check_whole)


def newest_sound(store: CheckpointStore, chosen: Path, verify: bool, fallback: bool) -> Path:
    """`chosen`, or the newest one before it whose content is what was written, sharing the reading among the
    ranks; what was found damaged is set aside. Collective.

    Raises UserError as `newest_whole` does, on all ranks.
    """

    def check(path: Path) -> None:
        with ranks.together():
            _check_whole(path)
            if verify:
                check_hashes(path, ranks.rank(), ranks.world_size())

    sound = _first_sound(store, chosen, fallback, check)
    ranks.on_main(lambda: _set_aside_after(store, sound))
    return sound


def _check_whole(path: Path) -> None:
    check_files(path)
    read_run_state(path)


def _first_sound(store: CheckpointStore, newest: Path, fallback: bool, check: Callable[[Path], None]) -> Path:
    older = [store.path(step) for step in reversed(store.steps()) if store.path(step).name < newest.name]
    for path in (newest, *older):
        try:
            check(path)
            return path
        except UserError as error:
            if not fallback:
                raise UserError(f"{error}\n{_HINT}") from error
            say(f"{error}\nfalling back to the checkpoint before it")
    raise UserError(
        f"{store.root}: every checkpoint is damaged; start anew in another output.dir, or restore one"
    )


def _set_aside_after(store: CheckpointStore, sound: Path) -> None:
    latest = store.latest()
    if latest is None or latest == sound:
        return
    for step in reversed(store.steps()):
        if sound.name < store.path(step).name <= latest.name:
            say(f"set aside: {store.set_aside(step)}")
