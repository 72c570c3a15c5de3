"""`solar-mega bench merge`: merging two large models, beside `cp` and mergekit.

`cp` is the yardstick: reading both models and writing one of the same size with `cp` and `cat`, which is what
any merge has to move. Each contestant is a process of its own, starts cold (`commands.cold_start`), and is
timed until its output is on the disk.
"""

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from solar_mega.artifact.hf import HFDirectory, write_config
from solar_mega.artifact.lineage import package_versions
from solar_mega.artifact.safetensors_reader import as_bytes
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.bench.commands import cold_start, measured, tree_bytes
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.errors import Problems
from solar_mega.model.architecture import Architecture
from solar_mega.runtime.console import Progress, human_bytes, human_seconds, say, table
from solar_mega.runtime.cores import available_cores
from solar_mega.runtime.files import require_empty, require_space

_SPREAD = 0.02  # standard deviation of the weights, as in trained models


@dataclass(frozen=True)
class MergeBench:
    """Merge two generated models of Mistral-7B's shape (or another depth), beside `cp` and mergekit."""

    work: Path
    """Directory for the generated models and the results; must not exist, or be empty. Three models have to
    fit. Removed at the end."""

    models: tuple[Path, ...] = ()
    """Two models to merge instead of generated ones; they are only read."""

    layers: int = 32
    """Decoder layers; 32 is Mistral-7B, 14.5 GB in bf16."""

    contestants: tuple[str, ...] = ("cp", "solar_mega", "mergekit")
    """Who takes part; mergekit only where its executable is found."""

    methods: tuple[str, ...] = ("slerp", "linear")
    """slerp (t = 0.3), linear (0.5, 0.5)."""

    rounds: int = 1
    """Times everything is measured; the JSON has every round."""

    mergekit: str | None = None
    """mergekit's executable (`mergekit-yaml`); default: the one on PATH."""

    out: Path | None = None
    """Write the result as JSON to this file."""


def run(options: MergeBench) -> None:
    """Generates the pair, runs every contestant in turn, prints a table, writes the JSON."""
    require_empty(options.work, "--work")
    _check(options)
    arch = _architecture(options.layers)
    if options.models:
        arch = Architecture.from_hf(HFDirectory(options.models[0]).config)
    nbytes = 2 * arch.parameters()
    require_space(options.work, (1 if options.models else 3) * nbytes + (1 << 30))
    peer = options.mergekit or shutil.which("mergekit-yaml")
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        pair = list(options.models) or generate_pair(arch, options.work)
        results = []
        for number in range(options.rounds):
            for result in _round(options, pair, peer):
                results.append({"round": number, **result})
                say(f"{result['contestant']}: {human_seconds(result['seconds'])}")
        report = _report(options, arch, nbytes, results)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    say(_table(report))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _check(options: MergeBench) -> None:
    problems = Problems()
    if options.models and len(options.models) != 2:
        problems.add(f"--models: two are merged, got {len(options.models)}")
    for flag, given, allowed in (
        ("--methods", options.methods, ("slerp", "linear")),
        ("--contestants", options.contestants, ("cp", "solar_mega", "mergekit")),
    ):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            problems.add(f"{flag} {' '.join(unknown)}: allowed are {', '.join(allowed)}")
    problems.raise_if_any("bench merge")


def _architecture(layers: int) -> Architecture:
    return Architecture.from_hf(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "num_hidden_layers": layers,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
    )


def generate_pair(arch: Architecture, place: Path) -> list[Path]:
    """Two bf16 models of `arch` with different weights, as place/a and place/b."""
    return [_generate(arch, place / name, seed) for seed, name in enumerate("ab")]


def _generate(arch: Architecture, place: Path, seed: int) -> Path:
    """A bf16 model whose weights are cut from one block of noise: fast to make, and not compressible. The
    models of both seeds share a part, so that the angle between them is about 37 degrees."""
    place.mkdir()
    common, own = (torch.Generator().manual_seed(n) for n in (99, seed))
    size = (64 << 20) + 1  # odd: tensors do not repeat at the same alignment
    block = torch.randn(size, generator=common) * 2 + torch.randn(size, generator=own)
    data = bytes(as_bytes((block * (_SPREAD / 5**0.5)).bfloat16()))
    shapes = hf_shapes(arch)
    with (
        ShardedWriter(place) as writer,
        Progress(2 * arch.parameters(), "bytes", f"generate {place.name}") as line,
    ):
        writer.plan([(name, "BF16", shape) for name, shape in shapes.items()])
        start = 0
        for name in shapes:
            wanted = writer.infos[name].nbytes
            writer.write_chunks(name, _cut(data, start, wanted))
            start = (start + wanted) % len(data)
            line.advance(wanted)
    write_config(place, dict(arch.hf_config))
    return place


def _cut(data: bytes, start: int, count: int) -> Iterator[memoryview]:
    """`count` bytes of `data` repeated for ever, from `start`."""
    view = memoryview(data)
    while count:
        piece = view[start : start + count]
        yield piece
        count -= len(piece)
        start = 0


def _round(options: MergeBench, pair: list[Path], peer: str | None) -> Iterator[dict[str, Any]]:
    out = options.work / "out"
    if "cp" in options.contestants:
        copy = f"cp -r {pair[0]} {out} && cat {pair[1]}/*.safetensors > /dev/null && sync {out} {out}/*"
        yield _measure("cp", "", ["sh", "-c", copy], pair, out)
    for method in options.methods:
        recipe = options.work / "recipe.yml"
        recipe.write_text(_recipe(method, pair), "utf-8")
        how = ["--t", "0.3"] if method == "slerp" else ["--weights", "0.5", "0.5"]
        ours = [sys.executable, "-m", "solar_mega", "merge", "--out", str(out), "--method", method]
        if "solar_mega" in options.contestants:
            yield _measure("solar_mega", method, [*ours, "--models", *map(str, pair), *how], pair, out)
        if "mergekit" in options.contestants and peer is not None:
            command = f"{peer} {recipe} {out} --quiet && sync {out} {out}/*"
            yield _measure("mergekit", method, ["sh", "-c", command], pair, out)


def _recipe(method: str, pair: list[Path]) -> str:
    a, b = pair
    if method == "slerp":
        models, tail = [f"  - model: {a}", f"  - model: {b}"], [f"base_model: {a}", "parameters:", "  t: 0.3"]
    else:
        models, tail = [f"  - model: {p}\n    parameters:\n      weight: 0.5" for p in pair], []
    return "\n".join([f"merge_method: {method}", "models:", *models, *tail, "dtype: bfloat16", ""])


def _measure(contestant: str, method: str, command: list[str], pair: list[Path], out: Path) -> dict[str, Any]:
    """One row of the results. Raises UserError when the command fails."""
    cold_start(pair, 3 * tree_bytes(pair[0]), out.parent)
    figures = measured(command)
    shutil.rmtree(out)
    return {
        "contestant": contestant,
        "method": method,
        "seconds": figures["wall_s"],
        "cpu_seconds": figures["cpu_s"],
        "peak_resident_bytes": figures["resident_bytes"],
    }


def _report(
    options: MergeBench, arch: Architecture, nbytes: int, results: list[dict[str, Any]]
) -> dict[str, Any]:
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()
    }
    for key in ("work", "out", "mergekit", "models"):
        settings.pop(key)
    return {
        "what": "merge two models, read from a cold disk, until the result is on it",
        "settings": {**settings, "layers": arch.num_layers},
        "model_bytes": nbytes,
        "parameters": arch.parameters(),
        "cores": available_cores(),
        "machine": platform.machine(),
        "versions": package_versions(),
        "results": results,
    }


def _table(report: dict[str, Any]) -> str:
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report["results"]:
        key = (result["contestant"], result["method"])
        if key not in best or result["seconds"] < best[key]["seconds"]:
            best[key] = result
    yardstick = best["cp", ""]["seconds"] if ("cp", "") in best else None
    rows = [
        (
            f"{r['contestant']} {r['method']}".strip(),
            human_seconds(r["seconds"]),
            "" if yardstick is None else f"{r['seconds'] / yardstick:.2f}",
            human_seconds(r["cpu_seconds"]),
            human_bytes(r["peak_resident_bytes"]),
        )
        for r in best.values()
    ]
    return table(rows, ("fastest round", "wall", "x cp", "CPU", "peak resident"))
