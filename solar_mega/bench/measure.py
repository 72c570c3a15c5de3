"""How the benchmarks measure: time, extra memory, copy bandwidth, and what they ran on.

Inputs are rotated, so that a call does not find its data in the cache because the one before left it there.
Providers are timed in turns, one call of each per round, so that a busy machine slows all alike. On a GPU,
calls over all input sets are also captured into one CUDA graph and its replays timed with events: that is the
GPU's time alone; `eager` is the same call launched from Python, gaps included.
"""

import datetime
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "apex",
    "liger-kernel",
    "quack-kernels",
    "flash-attn",
    "trl",
)


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    p20: float
    p50: float
    p80: float
    calls: int


def timing(seconds: Sequence[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(cuts[1], cuts[4], cuts[7], len(seconds))


def surroundings(device: torch.device) -> dict[str, Any]:
    """Device, versions, date and commit, for the head of every report."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return {
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": installed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _commit() -> str | None:
    """Of the source tree, with a + when it has changes; None outside of one."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_bytes(device: torch.device) -> int:
    """The last-level cache; 0 when the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):
        return 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of a copy of `size` bytes, read and written: the roof of this run."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = [_once(lambda: target.copy_(source), device) for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(seconds)


def _once(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    prepare: dict[str, Callable[[int], Call]], rounds: int, limit_s: float, device: torch.device
) -> dict:
    """Name -> seconds of each round, [rounds]. `prepare[name](round)` is not timed; the call it returns is.

    Stops early after `limit_s` seconds per provider, but not before three rounds. A first one is not counted.
    """
    names, seconds = list(prepare), {name: [] for name in prepare}
    began = time.perf_counter()
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:  # no fixed place in the round
            call = prepare[name](number)
            elapsed = _once(call, device)
            if number:
                seconds[name].append(elapsed)
        if number >= 3 and time.perf_counter() - began > limit_s * len(names):
            break
    return seconds


def graph_replays(calls: Sequence[Call], replays: int) -> list[float]:
    """Seconds per call on the GPU, from replays of one CUDA graph that holds every call once.

    `calls` must have been prepared, and run at least once, on the current stream, not the default one.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    seconds = []
    for number in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 2:
            seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    del kept, graph
    return seconds


def extra_memory(call: Call, device: torch.device) -> int:
    """Peak bytes that `call` adds to what was allocated before it, its results included. Counted at torch's
    allocator, which our compiled ops use too; scratch memory of math libraries escapes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def resident_growth(call: Call) -> int | None:
    """By how much `call` raises this process's peak resident memory over what it has now, everything counted;
    None where the kernel does not tell (it is Linux's, with permission to reset the peak)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
        before = _status_bytes(status, "VmRSS")
    except (OSError, KeyError):
        return None
    kept = call()
    peak = _status_bytes(status, "VmHWM")
    del kept
    return max(0, peak - before)


def _status_bytes(path: Path, key: str) -> int:
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(fields[key].split()[0]) * 1024


def as_json(value: Timing | None) -> dict | None:
    return None if value is None else asdict(value)
