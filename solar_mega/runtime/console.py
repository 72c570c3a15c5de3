"""What the person at the terminal sees: messages, progress with rate and ETA, tables, human-readable numbers.

Only rank 0 speaks (RANK as torchrun and SLURM scripts set it, so torch is not needed to know). Results go to
stdout, progress to stderr, so that a pipe gets the results alone.
"""

import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

_CLEAR_LINE = "\r\x1b[K"


def is_main() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints on rank 0, above a progress line if there is one."""
    if not is_main():
        return
    if sys.stderr.isatty():
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
    print(text, flush=True)


def _scaled(value: float, steps: Sequence[str], gap: str) -> str:
    index = 0
    # 999.5 and up would print as 1000 of the smaller unit.
    while abs(value) >= 999.5 and index < len(steps) - 1:
        value, index = value / 1000, index + 1
    if index == 0:
        # Without a unit small values keep their digits: 0.27 steps/s is not 0.
        text = f"{value:.0f}" if float(value).is_integer() or abs(value) >= 99.5 else f"{value:.3g}"
    else:
        text = f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"
    return f"{text}{gap}{steps[index]}".rstrip()


def human_bytes(count: float) -> str:
    """`21.5 GB`: three digits, powers of 1000, as disks and model hubs count."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(count: float) -> str:
    """`10.7B`, `3.2K`: three digits, powers of 1000, as parameters and tokens are counted."""
    return _scaled(count, ("", "K", "M", "B", "T"), "")


def human_seconds(seconds: float) -> str:
    """`0.4s`, `45s`, `3m20s`, `2h05m`, `3d04h`; `?` when not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Aligned columns under headers; columns of numbers to the right. No trailing newline.
    Raises ValueError when a row's length differs from the headers'."""
    cells = [[str(cell) for cell in row] for row in rows]
    if any(len(row) != len(headers) for row in cells):
        raise ValueError(f"every row needs {len(headers)} cells")
    columns = list(zip(*([list(headers)] + cells), strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(cells) and all(cell[:1].isdigit() or cell[:1] in "-+" for cell in c[1:]) for c in columns]

    def line(row: Sequence[str]) -> str:
        padded = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


class Rate:
    """Units per second over the last `window` seconds of observations (over all of them before that), so that
    a slow start or a pause does not spoil the estimate for ever. Pure: time comes in as an argument."""

    def __init__(self, window: float = 30.0) -> None:
        self.window = window
        self.points: deque[tuple[float, float]] = deque()

    def observe(self, now: float, done: float) -> None:
        """`done` units were complete at time `now` (seconds, any origin, not decreasing)."""
        self.points.append((now, done))
        # The oldest point kept is the last one outside the window: the span never falls below it.
        while len(self.points) > 2 and self.points[1][0] <= now - self.window:
            self.points.popleft()

    def per_second(self) -> float:
        """nan before there are two moments to compare."""
        if len(self.points) < 2 or self.points[-1][0] <= self.points[0][0]:
            return math.nan
        (start, first), (end, last) = self.points[0], self.points[-1]
        return (last - first) / (end - start)

    def eta(self, remaining: float) -> float:
        """Seconds until `remaining` more units are done; 0 when none remain, inf at a standstill."""
        if remaining <= 0:
            return 0.0
        rate = self.per_second()
        return remaining / rate if rate > 0 else math.inf


class Progress:
    """Progress of a known amount of work:

        with Progress(total_bytes, "bytes", "convert") as progress:
            progress.advance(len(chunk))

        convert  12.3 GB / 21.5 GB  57%  1.42 GB/s  ETA 6s

    One rewritten line on a terminal; elsewhere a plain line every few seconds, so that log files stay short.
    Ends with a line saying how long it took, or where it stopped when an exception passes through.
    `initial`: work that was done before (a resumed job), not counted in the rate. `advance` may be called
    from several threads."""

    def __init__(
        self,
        total: float,
        unit: str,
        label: str,
        initial: float = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.initial = initial, initial
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.terminal = self.stream.isatty()
        self.interval = 0.1 if self.terminal else 5.0
        self.rate = Rate()
        self.lock = threading.Lock()

    def __enter__(self) -> "Progress":
        self.start = self.shown = self.clock()
        self.rate.observe(self.start, self.done)
        return self

    def advance(self, amount: float = 1) -> None:
        with self.lock:
            self.done += amount
            now = self.clock()
            if now - self.shown >= self.interval:
                self.shown = now
                self.rate.observe(now, self.done)
                self._show(self.line())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now = self.clock()
        took = max(now - self.start, 1e-9)
        done = self._amount(self.done)
        if kind is None:
            speed = self._amount((self.done - self.initial) / took)
            self._show(f"{self.label}  {done} in {human_seconds(took)}  {speed}/s", last=True)
        else:
            self._show(
                f"{self.label}  stopped at {done} of {self._amount(self.total)} after {human_seconds(took)}",
                last=True,
            )

    def line(self) -> str:
        """The progress line as it would be drawn now."""
        share = 100 * self.done / self.total if self.total > 0 else 100.0
        speed, eta = self.rate.per_second(), self.rate.eta(self.total - self.done)
        parts = [self.label, f"{self._amount(self.done)} / {self._amount(self.total)}", f"{share:.0f}%"]
        if not math.isnan(speed):
            parts.append(f"{self._amount(speed)}/s")
        return "  ".join([*parts, f"ETA {human_seconds(eta)}"])

    def _amount(self, count: float) -> str:
        return human_bytes(count) if self.unit == "bytes" else f"{human_count(count)} {self.unit}"

    def _show(self, text: str, last: bool = False) -> None:
        if not is_main():
            return
        if not self.terminal:
            print(text, file=self.stream, flush=True)
            return
        # A line that wraps could not be rewritten.
        width = shutil.get_terminal_size().columns - 1
        print(_CLEAR_LINE + text[:width], end="\n" if last else "", file=self.stream, flush=True)
