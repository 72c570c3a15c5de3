"""`solar-mega bench convert`: every route of the converter beside `cp` and mergekit, on a generated
checkpoint.

Each route is a process of its own, as a user starts it. It starts cold (`commands.cold_start`), and what it
wrote is on the disk (fsync) when its clock stops; `cp` is held to the same. Measured:

    wall       seconds from start to exit, interpreter and imports included
    cpu        user and system seconds of the process and its children
    resident   largest resident memory of any one process, interpreter and imports included
    read, written    what the process passed to the kernel's read and write calls, and to or from the disk

Outputs are deleted as soon as nothing needs them: at most the source and two results lie on the disk at once.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.bench.checkpoint import generate
from solar_mega.bench.commands import cold_start, measured, tree_bytes
from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes, human_seconds, say, table
from solar_mega.runtime.files import require_space

ROUTES = ("cp", "mergekit", "cat", "verify", "megatron", "verify-megatron", "hf", "zero-copy", "copy")
"""What may be measured after the growth from Hugging Face to Hugging Face, which is always."""


@dataclass(frozen=True)
class ConvertBench:
    """Time every conversion of a generated Mistral-shaped bf16 checkpoint, beside cp and mergekit. The
    default is small (0.4 GB); Mistral-7B is --layers 32 --hidden 4096 --ffn 14336 --heads 32 --kv-heads 8
    --vocab 32000."""

    work: Path
    """Empty or new directory for the checkpoints; it is removed at the end."""
    layers: int = 16
    hidden: int = 1024
    ffn: int = 3584
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 8192
    shards: int = 3
    """Files of the source."""
    rounds: int = 1
    """Turns of growing and of cp, by which it is measured: a disk's speed changes from minute to minute. The
    times are the medians."""
    layer_map: str = "dus:4"
    tp: int = 2
    """Layout of the Megatron checkpoint."""
    pp: int = 4
    routes: tuple[str, ...] = ROUTES
    """Beside growing from Hugging Face to Hugging Face."""
    processes: int = 1
    """Processes that share the Megatron routes (torchrun)."""
    mergekit: Path | None = None
    """mergekit-yaml of an environment with mergekit, which does not install beside transformers 5; without it
    the one on PATH, or no comparison."""
    out: Path | None = None
    """Write the result as JSON to this file."""


def run(options: ConvertBench) -> dict[str, Any]:
    """Runs the benchmark, prints a table, returns (and writes) the result.

    Raises UserError: an unknown route, too little space, a route that failed (its output is in the message).
    """
    unknown = set(options.routes) - set(ROUTES)
    if unknown:
        raise UserError(f"--routes {' '.join(sorted(unknown))}: unknown; allowed: {' '.join(ROUTES)}")
    if options.work.exists() and any(options.work.iterdir()):
        raise UserError(
            f"--work {options.work} is not empty; name a new directory, which is removed at the end"
        )
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        report = _Bench(options).run()
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    _write(options, report)
    return report


def _write(options: ConvertBench, report: dict[str, Any]) -> None:
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


class _Bench:
    def __init__(self, options: ConvertBench) -> None:
        self.o = options
        self.source, self.grown = options.work / "source", options.work / "grown"
        self.megatron = options.work / "megatron"
        self.results: dict[str, dict[str, Any]] = {}
        self.ours = [sys.executable, "-m", "solar_mega"]

    def run(self) -> dict[str, Any]:
        o = self.o
        self.machine = _machine(o.work)
        self.generated = generate(self.source, o)
        result = self.generated * (len(self._map()) + 1) // (o.layers + 1)
        require_space(o.work, 2 * result + (64 << 20))
        self.expected = result
        map_flags = ["--layer-map", o.layer_map]
        grow = [*self.ours, "convert", self.source, self.grown, *map_flags]
        for _ in range(o.rounds):
            shutil.rmtree(self.grown, ignore_errors=True)
            self._measure("grow", grow, [self.source], self.grown)
            if "cp" in o.routes:
                self._cp()
        if "mergekit" in o.routes:
            self._mergekit()
        if "cat" in o.routes:
            script = 'cat "$1"/* "$2"/* > /dev/null'
            both = [self.source, self.grown]
            self._measure("cat", ["bash", "-c", script, "cat", *both], both)
        if "verify" in o.routes:
            self._measure(
                "verify",
                [*self.ours, "verify", self.source, self.grown, *map_flags],
                [self.source, self.grown],
            )
        shutil.rmtree(self.grown)
        self._megatron_routes(map_flags)
        report = self._report()
        say(_sheet(report))
        return report

    def _report(self) -> dict[str, Any]:
        o = self.o
        return {
            "shape": {
                k: getattr(o, k) for k in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "shards")
            },
            "layer_map": o.layer_map,
            "layout": {"tp": o.tp, "pp": o.pp},
            "processes": o.processes,
            "source_bytes": self.generated,
            "machine": self.machine,
            "routes": self.results,
        }

    def _map(self):
        from solar_mega.depth.layer_map import LayerMap

        return LayerMap.parse(self.o.layer_map, self.o.layers)

    def _measure(
        self, name: str, command: Sequence[Any], inputs: Sequence[Path], output: Path | None = None
    ) -> None:
        cold_start(inputs, self.generated + 2 * self.expected, self.o.work)
        figures = measured([str(word) for word in command])
        if output is not None:
            figures["output_bytes"] = tree_bytes(output)
        all_s = [*self.results.get(name, {}).get("wall_s_all", []), figures["wall_s"]]
        figures |= {"wall_s": statistics.median(all_s), "wall_s_all": all_s}
        self.results[name] = {**figures, "load_average": round(os.getloadavg()[0], 2)}
        _write(self.o, self._report())  # a long run that breaks off has measured something all the same
        say(f"{name}: {human_seconds(all_s[-1])}, {human_bytes(figures['resident_bytes'])} resident")

    def _cp(self) -> None:
        """The output's own bytes, copied and put on the disk."""
        copy = self.o.work / "cp"
        script = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} + && sync "$2"'
        self._measure("cp", ["bash", "-c", script, "cp", self.grown, copy], [self.grown], copy)
        shutil.rmtree(copy)

    def _mergekit(self) -> None:
        tool = self.o.mergekit or shutil.which("mergekit-yaml")
        if tool is None:
            say("mergekit: not found (--mergekit PATH of mergekit-yaml), not compared")
            return
        recipe, made = self.o.work / "recipe.yaml", self.o.work / "mergekit"
        recipe.write_text(mergekit_recipe(self.source, self._map()), "utf-8")
        script = '"$1" "$2" "$3" --no-copy-tokenizer && find "$3" -type f -exec sync {} +'
        self._measure("mergekit", ["bash", "-c", script, "mergekit", tool, recipe, made], [self.source], made)
        done = subprocess.run(
            [*map(str, self.ours), "verify", str(self.source), str(made), "--layer-map", self.o.layer_map],
            capture_output=True,
            text=True,
        )
        self.results["mergekit"]["identical_to_ours"] = done.returncode == 0
        self.results["mergekit"]["compared"] = done.stdout.strip().splitlines()[-1:]
        shutil.rmtree(made)

    def _megatron_routes(self, map_flags: list[str]) -> None:
        o, work = self.o, self.o.work
        if not {"megatron", "verify-megatron", "hf", "zero-copy", "copy"} & set(o.routes):
            return
        shared = self.ours
        if o.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(o.processes)]
            shared = [sys.executable, *launch, "-m", "solar_mega"]
        layout = ["--to", "megatron", "--tp", o.tp, "--pp", o.pp]
        command = [*shared, "convert", self.source, self.megatron, *map_flags, *layout]
        self._measure("hf to megatron", command, [self.source], self.megatron)
        if "verify-megatron" in o.routes:
            command = [*self.ours, "verify", self.source, self.megatron, *map_flags]
            self._measure("verify megatron", command, [self.source, self.megatron])
        if "hf" in o.routes:
            back = work / "back"
            self._measure("megatron to hf", [*shared, "convert", self.megatron, back], [self.megatron], back)
            same = _weights_hash(self.megatron) == _weights_hash(back)
            self.results["megatron to hf"]["round_trip_hash_equal"] = same
            shutil.rmtree(back)
        for name, flags in (("zero-copy", ["--zero-copy"]), ("copy", [])):
            if name in o.routes:
                made = work / name
                command = [
                    *self.ours,
                    "convert",
                    self.megatron,
                    made,
                    "--to",
                    "megatron",
                    *map_flags_of(self._map()),
                    *flags,
                ]
                self._measure(f"megatron to megatron, {name}", command, [self.megatron], made)
                if name == "zero-copy":
                    self.results[f"megatron to megatron, {name}"] |= self._operation(made)
                shutil.rmtree(made)

    def _operation(self, made: Path) -> dict[str, Any]:
        """The zero-copy conversion alone, in this process, without interpreter and imports."""
        from solar_mega.checkpoint.convert import Conversion, run
        from solar_mega.checkpoint.source import open_source

        seconds = []
        for _ in range(5):
            shutil.rmtree(made)
            words = map_flags_of(self._map())[1]
            job = Conversion(open_source(self.megatron), made, "megatron", words, zero_copy=True)
            os.sync()  # what the deletion left to write is not the operation's
            start = time.perf_counter()
            run(job, False, _no_progress)
            seconds.append(round(time.perf_counter() - start, 5))
        return {"operation_s": sorted(seconds)[2], "operation_s_all": seconds}


def _no_progress(total: int, unit: str, label: str, initial: int = 0):
    from solar_mega.artifact.progress import silent

    return silent(total, unit, label, initial)


def map_flags_of(layer_map: Any) -> list[str]:
    """Growing the grown model once more, by as many layers as the map's depth has in common with it."""
    return ["--layer-map", f"dus:{len(layer_map) // 4}"]


def mergekit_recipe(source: Path, layer_map: Any) -> str:
    """A passthrough recipe that does what the map does. Raises UserError for maps that change weights."""
    if layer_map.changed or layer_map.fresh:
        raise UserError(
            f'layer map "{layer_map}" changes layers; mergekit is compared on maps that only copy'
        )
    lines = ["slices:"]
    for piece in layer_map.runs:
        first = piece.source
        lines += [
            "  - sources:",
            f"      - model: {source}",
            f"        layer_range: [{first}, {first + piece.length}]",
        ]
    return "\n".join([*lines, "merge_method: passthrough", "dtype: bfloat16", ""])


def _weights_hash(directory: Path) -> str | None:
    states = [*directory.glob("step-*/run_state.json"), *directory.glob("lineage.json")]
    content = json.loads(states[0].read_text("utf-8"))
    lineage = content["state"]["lineage"] if "state" in content else content["config"]
    return lineage.get("weights_hash")


def _machine(place: Path) -> dict[str, Any]:
    import importlib.metadata

    import psutil

    place = place.resolve()
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: -len(mount.mountpoint))
    mount = next((m for m in mounts if place.is_relative_to(m.mountpoint)), None)
    return {
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "file_system": mount.fstype if mount else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _sheet(report: dict[str, Any]) -> str:
    base = report["routes"].get("cp", {}).get("wall_s")
    rows = []
    for name, figures in report["routes"].items():
        rows.append(
            (
                name,
                f"{figures['wall_s']:.1f} s",
                f"{figures['wall_s'] / base:.2f}" if base else "",
                f"{figures['cpu_s']:.1f} s",
                human_bytes(figures["resident_bytes"]),
                human_bytes(figures["read_bytes"]),
                human_bytes(figures["written_bytes"]),
            )
        )
    return table(rows, ("", "wall", "x cp", "CPU", "resident", "read", "written"))
