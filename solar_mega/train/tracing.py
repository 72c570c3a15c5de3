"""torch's profiler over a few steps, on request."""

import os
from pathlib import Path

import torch

from solar_mega.runtime.console import say


class Tracing:
    """with Tracing((10, 12), run) as tracing: before each step: tracing.before(step)

    Writes `profile/rank-0000-steps-10-12.json.gz` (one per rank), for https://ui.perfetto.dev.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path | None) -> None:
        self.steps, self.directory = steps if directory is not None else None, directory
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        if self.steps is None:
            return
        first, last = self.steps
        if self._profiler is None and first <= step <= last:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()
        elif self._profiler is not None and step > last:
            self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self.steps
        place = self.directory / "profile"
        place.mkdir(parents=True, exist_ok=True)
        rank = int(os.environ.get("RANK", "0"))
        profiler.export_chrome_trace(str(place / f"rank-{rank:04d}-steps-{first}-{last}.json.gz"))
        say(f"traced    steps {first} to {last}: {place}")

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profiler is not None:
            self._write()
