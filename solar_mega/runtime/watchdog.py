"""A run that hangs says where, on every rank, and ends.

Ranks wait for each other without a word: when one is stuck, all are. Each has a thread that watches whether
its loop still goes round; when not, it writes the stacks of all its threads to a file and ends the process.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from solar_mega.errors import ExitCode

_GRACE = 5.0
"""Seconds between writing stacks and ending: the launcher ends all ranks with the first, and each shall have
had time to write."""
_STUCK = 30.0
"""Seconds more until the fault handler's own thread acts, which needs no Python: for a rank stuck in C."""

T = TypeVar("T")


class Watchdog:
    """with Watchdog(300, run / "hangs") as dog: ... dog.beat("step 41") ...

    Armed by the first beat. `seconds` 0 turns it off.
    """

    def __init__(self, seconds: float, directory: Path | None) -> None:
        self.seconds = seconds if directory is not None else 0.0
        self.report = None if directory is None else directory / f"rank-{os.environ.get('RANK', '0'):>04}.txt"
        self._doing = ""
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._file = None

    def beat(self, doing: str, allowance: float = 1.0) -> None:
        """Progress was made; what comes next, `doing`, may take `allowance` times the usual seconds."""
        self._doing, self._deadline = doing, time.monotonic() + self.seconds * allowance

    def along(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """The items; each one that is asked for is progress."""
        for item in items:
            self.beat(doing)
            yield item

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()

    def _watch(self) -> None:
        interval = min(5.0, self.seconds / 4)
        while not self._ended.wait(interval):
            deadline = self._deadline
            if deadline is None:
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                self._end()
            with contextlib.suppress(OSError):
                self._rearm(left)

    def _rearm(self, left: float) -> None:
        """Should this thread never run again, C acts in its place."""
        faulthandler.dump_traceback_later(left + _STUCK, exit=True, file=self._open())

    def _open(self):
        if self._file is None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.report, "w")  # noqa: SIM115 (faulthandler keeps its descriptor)
        return self._file

    def _end(self) -> None:
        where = self.report
        try:
            stream = self._open()
            stream.write(f"no progress for {self.seconds:.0f} s; doing: {self._doing}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()
        except OSError as error:
            where = f"nowhere ({error})"
        print(
            f"solar-mega: rank {os.environ.get('RANK', '0')}: no progress for {self.seconds:.0f} s "
            f"(train.hang_seconds), last in: {self._doing}. Stacks of all threads: {where}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_GRACE)
        os._exit(ExitCode.HUNG)
