"""Kills conversions with SIGKILL at random points, and looks at what is left.

    python -m tests.campaigns.kill_convert --kills 8 --out docs/benchmarks/cpu/kill-convert.json

After each kill: the source has its hash, DST is absent or complete and verified, and the same command
finishes and verifies, going on from the parts that were on the disk. A conversion runs in a forked child of
this process, so that kills hit the work and not the start of the interpreter. Ends with exit code 1 at the
first violation.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Children are forked: no thread pool may exist in the parent.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from solar_mega.__main__ import main
from solar_mega.artifact.lineage import directory_hash
from solar_mega.bench.checkpoint import generate

MAP = "dus:1"


@dataclass(frozen=True)
class Small:
    """About 100 MB: an operation takes some tenths of a second, in several parts."""

    layers: int = 6
    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 8192
    shards: int = 3


@dataclass(frozen=True)
class Route:
    name: str
    source: str
    flags: tuple[str, ...]


ROUTES = (
    Route("hf to hf", "hf", ("--shard-size", "10MB")),
    Route("hf to megatron", "hf", ("--to", "megatron", "--tp", "2", "--pp", "2", "--shard-size", "10MB")),
    Route("megatron to hf", "megatron", ("--shard-size", "10MB")),
    Route("megatron to megatron, copy", "megatron", ("--to", "megatron", "--shard-size", "10MB")),
    Route("megatron to megatron, zero-copy", "megatron", ("--to", "megatron", "--zero-copy")),
)


class Violation(Exception):
    """What must not happen after a kill."""


def campaign(root: Path, kills: int, seed: int, progress=print) -> dict[str, Any]:
    """`kills` kills of every route below the empty directory `root`. Raises Violation."""
    torch.set_num_threads(1)
    sources = {"hf": root / "hf", "megatron": root / "megatron"}
    generate(sources["hf"], Small())
    _quietly("convert", sources["hf"], sources["megatron"], "--to", "megatron", "--tp", 2, "--pp", 2)
    hashes = {name: directory_hash(path) for name, path in sources.items()}
    draw = random.Random(seed)
    records = []
    for route in ROUTES:
        source = sources[route.source]
        words = ["convert", source, root / "made", "--layer-map", MAP, *route.flags]
        duration = _timed(words, root / "made")
        for _ in range(kills):
            record = _one(route, source, words, root / "made", draw.uniform(0, 1.05 * duration))
            if directory_hash(source) != hashes[route.source]:
                raise Violation(f"{route.name}: the source changed")
            records.append({"route": route.name, **record})
            progress(json.dumps(records[-1]))
    return {
        "seed": seed,
        "kills": len(records),
        "violations": 0,
        "summary": _summary(records),
        "records": records,
    }


def _one(route: Route, source: Path, words: list, made: Path, delay: float) -> dict[str, Any]:
    killed = _killed_after(words, delay)
    left = sorted(
        path.name for path in made.parent.iterdir() if path.name.startswith(f".{made.name}.partial")
    )
    complete = made.exists()
    verify = ("verify", source, made, "--layer-map", MAP)
    if complete and _quietly(*verify)[0] != 0:
        raise Violation(f"{route.name}: an output that appeared is not complete")
    parts = 0
    if not complete:
        code, text = _quietly(*words)
        if code != 0:
            raise Violation(f"{route.name}: the rerun failed: {text[-800:]}")
        found = re.search(r"(\d+) finished parts are kept", text)
        parts = int(found[1]) if found else 0
        if _quietly(*verify)[0] != 0:
            raise Violation(f"{route.name}: what the rerun made does not verify")
    after = [path.name for path in made.parent.iterdir() if path.name.startswith(f".{made.name}.partial")]
    if after:
        raise Violation(f"{route.name}: {after} stayed behind")
    shutil.rmtree(made)
    state = "complete" if complete else "partial" if left else "nothing"
    return {
        "killed": killed,
        "after_s": round(delay, 4),
        "left": state,
        "parts_kept": parts,
        "verified": True,
    }


def _killed_after(words: list, delay: float) -> bool:
    """Whether the conversion was still at work when it was killed."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        os._exit(main([str(word) for word in words]))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _timed(words: list, made: Path) -> float:
    """Seconds of a whole run, the second of two: the first pays for imports and cold files."""
    for _ in range(2):
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            os._exit(_quietly(*words)[0])
        _, status = os.waitpid(child, 0)
        if status:
            raise Violation(f"{words[:3]} failed")
        seconds = time.perf_counter() - start
        shutil.rmtree(made)
    return seconds


def _quietly(*words) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main([str(word) for word in words])
    return code, text.getvalue()


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {}
    for route in ROUTES:
        mine = [record for record in records if record["route"] == route.name]
        summary[route.name] = {
            "kills": len(mine),
            "at_work": sum(record["killed"] for record in mine),
            "left_partial": sum(record["left"] == "partial" for record in mine),
            "left_complete": sum(record["left"] == "complete" for record in mine),
            "continued": sum(record["parts_kept"] > 0 for record in mine),
            "verified": sum(record["verified"] for record in mine),
        }
    return summary


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8, help="per route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = campaign(Path(folder), options.kills, options.seed)
        except Violation as violation:
            print(f"VIOLATION: {violation}", file=sys.stderr)
            return 1
    print(json.dumps(result["summary"], indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
