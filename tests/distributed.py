"""Run a function on several real ranks: torchrun's agent, gloo, one process each.

    results = run_ranks(worker, 4, argument, ...)        # worker(argument, ...) on each rank; results by rank

The worker must be a module-level function of a test file. It runs in processes of its own, so it starts its
own groups (`solar_mega.runtime.parallel.running`), and returns something that pickles. The processes come
from `tests.rank_server`, which has imported what they need.
"""

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class RankFailure(AssertionError):
    """A rank exited with an error; the message is the end of what the ranks printed."""


class Ended(NamedTuple):
    """How a launcher and its ranks ended."""

    returncode: int
    output: str
    """What they printed, standard output and errors together."""

    @property
    def of_the_ranks(self) -> str:
        """The output up to the agent's own report, which only says that a rank failed."""
        agent = "torch/distributed/elastic/multiprocessing/api.py"
        return self.output.split(agent)[0].rsplit("\n", 1)[0] or self.output


def run_ranks(worker, ranks: int, *args, timeout: float = 300, check: bool = True):
    """Returns [worker(*args) of rank 0, 1, ...]; with `check=False`, how they `Ended`."""
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder, "call.pkl")
        call.write_bytes(pickle.dumps((sys.modules[worker.__module__].__file__, worker.__qualname__, args)))
        request = {"call": str(call), "folder": folder, "ranks": ranks, "environment": _environment()}
        code = _Server.at_work().launch(request, timeout)
        ended = Ended(code, Path(folder, "output").read_text("utf-8", "replace"))
        if not check:
            return ended
        if code:
            raise RankFailure(ended.of_the_ranks[-6000:])
        return [pickle.loads(Path(folder, f"rank{r}.pkl").read_bytes()) for r in range(ranks)]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


class _Server:
    """The rank server of this process, started when it is first needed."""

    _one: "_Server | None" = None

    @classmethod
    def at_work(cls) -> "_Server":
        if cls._one is None or cls._one.process.poll() is not None:
            cls._one = cls()
            atexit.register(cls._one.process.stdin.close)
        return cls._one

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_server"],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select must see a line that is there
            cwd=ROOT,
        )

    def launch(self, request: dict, timeout: float) -> int:
        """The launcher's exit code. Raises TimeoutExpired; nothing it started is then left."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        group = self._answer("pid")
        try:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(request["call"], timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self._answer("code")
            raise
        return self._answer("code")

    def _answer(self, key: str) -> int:
        return json.loads(self.process.stdout.readline())[key]
