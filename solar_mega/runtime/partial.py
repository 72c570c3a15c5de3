"""A directory built over several attempts: a kill costs the unit of work at hand, not everything before it.

As `files.atomic_directory`, the result appears under its name only when it is complete. Until then it grows
under a temporary name, which also holds, in `.work/`, the plan and a note of each unit that is finished and
on the disk:

    .NAME.partial-HOST-PID/
      .work/plan.json         what is being made of what
      .work/done-UNIT.json    what the unit's maker wants to know about it later
      ...                     the files themselves

The next run for the same place with the same plan takes the directory over and does what is missing. With
another plan it says so and starts anew.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from solar_mega.errors import UserError
from solar_mega.runtime.console import say
from solar_mega.runtime.files import (
    abandoned,
    atomic_file,
    disk_errors,
    partial_name,
    rename_into_place,
    sync_tree,
)

_WORK = ".work"
_PLAN = "plan.json"


class Partial:
    """The directory at work. Units are named by the caller; a name is part of a file name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work = path / _WORK

    def done(self) -> dict[str, Any]:
        """Finished units and what was noted of them. A note that cannot be read is no note."""
        found = {}
        for note in sorted(self._work.glob("done-*.json")):
            with contextlib.suppress(OSError, ValueError):
                found[note.name[len("done-") : -len(".json")]] = json.loads(note.read_text("utf-8"))
        return found

    def clean(self, keep: Collection[str]) -> None:
        """Removes all files but those in `keep` (paths inside the directory) and the notes."""
        for place, folders, files in os.walk(self.path, topdown=False):
            inside = os.path.relpath(place, self.path)
            if inside.split(os.sep)[0] == _WORK:
                continue
            for name in files:
                if os.path.normpath(os.path.join(inside, name)) not in keep:
                    os.unlink(os.path.join(place, name))
            for name in folders:
                with contextlib.suppress(OSError):  # what is kept lies in it
                    os.rmdir(os.path.join(place, name))

    def finish(self, unit: str, note: Any = None) -> None:
        """Call when the unit's bytes are on the disk (fsync). `note` must fit in JSON."""
        with atomic_file(self._work / f"done-{unit}.json") as stream:
            json.dump(note, stream)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For other processes that write into the directory: nobody takes it over while they live."""
        lock = _lock(self.path)
        try:
            yield
        finally:
            os.close(lock)


@contextlib.contextmanager
def resumable_directory(path: Path, plan: Mapping[str, Any]) -> Iterator[Partial]:
    """Yields the directory to build, new or a killed run's; it becomes `path` when the block ends well.

    Args:
        plan: everything that decides what is written, sources included; must fit in JSON.

    An error removes what was built, Ctrl-C keeps it as a kill does. Raises UserError as `atomic_directory`.
    """
    path = Path(path).absolute()
    text = json.dumps(plan, sort_keys=True)
    partial = partial_name(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _take_over(path, partial, text)
        try:
            yield Partial(partial)
            shutil.rmtree(partial / _WORK)
            sync_tree(partial)
            rename_into_place(partial, path)
        except KeyboardInterrupt:
            say(f"stopped; what is finished stays in {partial}: the same command continues, or remove it")
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


class SideJobs:
    """One thread beside the main work: hashing, and waiting for the disk. At most `limit` jobs wait, so that
    what they hold does not pile up in memory. An error in a job is raised at the next `submit`, or at the end
    of the `with` block.
    """

    def __init__(self, limit: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()
        self._limit = limit

    def __enter__(self) -> "SideJobs":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future:
        while len(self._waiting) >= self._limit or self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(job, *arguments))
        return self._waiting[-1]


def left_behind(path: Path) -> int:
    """Bytes on the disk that killed runs left for `path`: the next one continues or removes them."""
    path = Path(path).absolute()
    if not path.parent.is_dir():
        return 0
    found = [
        Path(place, name) for left in abandoned(path) for place, _, names in os.walk(left) for name in names
    ]
    return sum(file.stat().st_blocks * 512 for file in found)


def fingerprint(directory: Path) -> dict[str, list[int]]:
    """{file: [bytes, time of change]} of a directory, which tells whether a source is the one of the plan."""
    found = {}
    for place, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            stats = os.stat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), directory)] = [stats.st_size, stats.st_mtime_ns]
    return found


def _take_over(path: Path, partial: Path, plan: str) -> int:
    """Makes `partial`, from what a killed run left where that had the same plan. Returns the lock on it."""
    taken = False
    for left in abandoned(path):
        try:
            same = (left / _WORK / _PLAN).read_text("utf-8") == plan
        except (OSError, UnicodeDecodeError):
            same = False
        if same and not taken:
            if left != partial:
                os.rename(left, partial)
            taken = True
            count = len(Partial(partial).done())
            say(f"continuing what a killed run left for {path}: {count} finished parts are kept")
            continue
        why = "another copy is taken" if same else "it was made of something else, or by another plan"
        say(f"removing what a killed run left, {left.name}: {why}")
        shutil.rmtree(left, ignore_errors=True)
    if not taken:
        try:
            partial.mkdir()
        except FileExistsError:
            raise UserError(f"{path} is being written by another run ({partial.name}); wait for it") from None
        (partial / _WORK).mkdir()
        with atomic_file(partial / _WORK / _PLAN) as stream:
            stream.write(plan)
    return _lock(partial)


def _lock(directory: Path) -> int:
    """A shared lock: all processes of a run hold one, and only a directory without any is abandoned."""
    lock = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # file systems without locks: abandoned directories stay
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock
