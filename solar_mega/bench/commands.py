"""What a command costs: wall and CPU seconds, memory, bytes; each from the same cold start."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from solar_mega.errors import UserError

# Times what a contestant needs. Not simply all: there are machines whose memory takes minutes to fill.
_FILLED = 4

# Runs a command and writes down what the kernel counted for it and its children. A small process of its own:
# a child's largest memory is never less than that of the process it was forked from.
_COUNTER = """
import json, os, sys, time

def counts():
    return {key: int(value) for key, value in (line.split(": ") for line in open("/proc/self/io"))}

before, start = counts(), time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
wall = time.perf_counter() - start
done = {key: value - before[key] for key, value in counts().items()}
json.dump(
    {
        "wall_s": round(wall, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "resident_bytes": usage.ru_maxrss * 1024,
        "read_bytes": done["rchar"],
        "written_bytes": done["wchar"],
        "disk_read_bytes": done["read_bytes"],
        "disk_written_bytes": done["write_bytes"],
    },
    open(sys.argv[1], "w"),
)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command to its end and returns what it took:

        wall_s, cpu_s          seconds; the CPU's of the command and its children, user and system
        resident_bytes         largest resident memory of any one process
        read_bytes, written_bytes               passed to the kernel's read and write calls
        disk_read_bytes, disk_written_bytes     to and from the disk

    Raises UserError with the end of its output when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder, "figures"), Path(folder, "log")
        with open(log, "wb") as output:
            counter = [sys.executable, "-S", "-E", "-c", _COUNTER, str(figures), *command]
            code = subprocess.run(counter, stdout=output, stderr=output).returncode
        if code:
            tail = log.read_text("utf-8", "replace")[-2000:]
            raise UserError(f"{' '.join(command[:6])} ... ended with exit code {code}:\n{tail}")
        return json.loads(figures.read_text())


def cold_start(inputs: Sequence[Path], nbytes: int, work: Path) -> None:
    """Puts the machine into the state from which every contestant starts: `inputs` (directories) are on the
    disk and in no cache, and memory for `nbytes`, all that the contestant reads and writes, is at hand.

    The second matters on virtual machines. A host takes back what its guest has freed, and gives it back page
    fault by page fault, which can take longer than copying. Who starts after a large deletion would pay for
    it and who starts with a full page cache would not. So the cache is filled with the pages of a sparse
    file, left in `work`, until no memory is free; a contestant then takes over pages that are there.
    """
    for directory in inputs:
        for file in directory.rglob("*"):
            if file.is_file():
                _evict(file)
    os.sync()
    filler = work / "filler"
    with open(filler, "a+b", buffering=0) as stream:
        stream.truncate(min(psutil.virtual_memory().total, _FILLED * nbytes))
        stream.seek(0)
        buffer = bytearray(4 << 20)
        while stream.readinto(buffer):
            pass


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _evict(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
