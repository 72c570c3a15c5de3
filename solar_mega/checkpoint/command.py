"""Command lines of `convert`, `verify` and `inspect`: Hugging Face directories and Megatron checkpoints, told
apart by what is in them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.config.units import parse_bytes
from solar_mega.errors import UserError
from solar_mega.runtime.console import Progress, human_bytes, human_count, human_seconds, say, table

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ConvertOptions:
    """Write SRC as DST, through a layer map.

    Each may be a Hugging Face directory or a Megatron distributed checkpoint. DST appears only when it is
    complete. Between Hugging Face directories bytes are moved, not decoded. Megatron checkpoints are written
    and read as a model: started with torchrun, its ranks share it, as --tp and --pp say.
    """

    src: Positional[Path]
    """Hugging Face directory, Megatron checkpoint, or a run's directory (its latest checkpoint)."""

    dst: Positional[Path]
    """Where to write; must not exist, or be empty."""

    layer_map: str = "identity"
    """Which source layer each target layer is: `identity`, `dus:M`, `stack:G`, `interleave:G`, `repeat:A-B`,
    `llama-pro:K`, `append:K`, `mean`, `slices:0-24,8-32`, a list or a mergekit recipe.yaml; then changes such
    as `+freeze@originals`, `+scale:0.5@24-48`, `+noise:0.001:7@copies` (docs/layer_maps.md)."""

    to: Literal["hf", "megatron"] = "hf"
    """What to write."""

    dtype: Precision | None = None
    """dtype of the weights written; default: that of the source."""

    shard_size: str = "5GB"
    """Largest safetensors file."""

    tp: int = 1
    """Tensor-parallel ranks that share the model (Megatron checkpoints only; start with torchrun)."""

    pp: int = 1
    """Pipeline stages that share the model (Megatron checkpoints only; start with torchrun)."""

    dry_run: bool = False
    """Check everything, print the layer map and sizes, write nothing."""

    config: Path | None = None
    """TOML file with these settings (`src = ...`, `dst = ...`, `layer_map = ...`); the command line wins."""


@dataclass(frozen=True)
class VerifyOptions:
    """Prove that DST is SRC through the layer map, bit for bit. Exit code 1, and the first differing tensor,
    when it is not. One of the two may be a Megatron checkpoint."""

    src: Positional[Path]
    """What the other was made from: Hugging Face directory, Megatron checkpoint, or a run's directory."""

    dst: Positional[Path]
    """What to check, likewise."""

    layer_map: str = "identity"
    """The map DST was made through."""

    dtype: Precision | None = None
    """The --dtype DST was made with, if it was."""


@dataclass(frozen=True)
class InspectOptions:
    """What a Hugging Face directory, a Megatron checkpoint or a run's directory holds. Reads headers only."""

    directory: Positional[Path]
    """What to look at."""

    json: bool = False
    """Print JSON instead of a table."""


def convert(argv: Sequence[str]) -> int:
    """`solar-mega convert SRC DST`"""
    options = parse_options(ConvertOptions, argv, "convert")
    shard_bytes = parse_bytes(options.shard_size, "--shard-size")
    if options.src.resolve() == options.dst.resolve():
        raise UserError(f"SRC and DST are the same directory: {options.src}")
    from solar_mega.checkpoint.source import open_source

    source = open_source(options.src, "SRC")
    if source.kind == "hf" and options.to == "hf":
        return _grow(options, source.path, shard_bytes)
    from solar_mega.checkpoint.convert import Conversion, run

    conversion = Conversion(
        source=source,
        target=options.dst,
        to=options.to,
        layer_map=options.layer_map,
        dtype=options.dtype,
        shard_bytes=shard_bytes,
        tp=options.tp,
        pp=options.pp,
    )
    return run(conversion, dry_run=options.dry_run)


def _grow(options: ConvertOptions, src: Path, shard_bytes: int) -> int:
    """Hugging Face to Hugging Face."""
    from solar_mega.artifact.cast import weight_dtype
    from solar_mega.artifact.grow import grow, plan_growth
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.depth.layer_map import LayerMap
    from solar_mega.runtime.files import free_bytes, require_empty

    if (options.tp, options.pp) != (1, 1):
        raise UserError("--tp and --pp are for Megatron checkpoints, not from Hugging Face to Hugging Face")
    source = HFDirectory(src)
    layer_map = LayerMap.parse(options.layer_map, source.num_layers)
    dtype = weight_dtype(options.dtype) if options.dtype else None
    say(layer_map.describe())
    if options.dry_run:
        plan = plan_growth(source, layer_map, dtype, shard_bytes)
        require_empty(options.dst, "DST")
        free = human_bytes(free_bytes(options.dst))
        say(
            f"would write {options.dst}: {len(layer_map)} layers, {human_count(plan.parameters)} parameters, "
            f"{human_bytes(plan.nbytes)} in {_files(plan.shards)}; free there: {free}"
        )
        return 0
    report = grow(source, options.dst, layer_map, dtype, shard_bytes, Progress)
    say(
        f"{report.path}: {report.layers} layers, {human_count(report.parameters)} parameters, "
        f"{human_bytes(report.nbytes)} in {_files(report.shards)}, {human_seconds(report.seconds)}\n"
        f"check it: solar-mega verify {options.src} {options.dst} --layer-map {options.layer_map}"
        + (f" --dtype {options.dtype}" if options.dtype else "")
    )
    return 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def verify(argv: Sequence[str]) -> int:
    """`solar-mega verify SRC DST`; 0 when equal, 1 when not."""
    options = parse_options(VerifyOptions, argv, "verify")
    from solar_mega.artifact.cast import weight_dtype
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.artifact.verify import verify as compare
    from solar_mega.checkpoint.source import open_source
    from solar_mega.depth.layer_map import LayerMap

    src, dst = open_source(options.src, "SRC"), open_source(options.dst, "DST")
    layer_map = LayerMap.parse(options.layer_map, src.config["num_hidden_layers"])
    dtype = weight_dtype(options.dtype) if options.dtype else None
    if src.kind == dst.kind == "megatron":
        raise UserError(
            "SRC and DST are both Megatron checkpoints; convert one of them --to hf and verify that"
        )
    if src.kind == dst.kind:
        report = compare(HFDirectory(src.path), HFDirectory(dst.path), layer_map, dtype, Progress)
    else:
        from solar_mega.checkpoint.verify_megatron import verify_export, verify_import

        if dst.kind == "megatron":
            report = verify_import(HFDirectory(src.path), dst.path, layer_map, dtype, Progress)
        else:
            report = verify_export(src.path, HFDirectory(dst.path), layer_map, dtype, Progress)
    say(report.describe())
    return 0 if report.ok else 1


def inspect(argv: Sequence[str]) -> int:
    """`solar-mega inspect DIR`; 1 when what is there is damaged or incomplete."""
    options = parse_options(InspectOptions, argv, "inspect")
    from solar_mega.checkpoint.source import open_source

    if (options.directory / "config.json").is_file():
        from solar_mega.artifact.inspect import inspect_hf

        content = inspect_hf(options.directory)
    else:
        from solar_mega.checkpoint.run_state import describe_megatron

        source = open_source(options.directory, "DIR")
        content = {"path": str(source.path.absolute()), **describe_megatron(source.path)}
    say(json.dumps(content, indent=2) if options.json else _sheet(content))
    return 0 if content["complete"] else 1


def _sheet(content: dict[str, Any]) -> str:
    """The description as two columns, sizes made readable; nested values as one line of JSON each."""
    rows = []
    for key, value in content.items():
        if key == "path" or value is None or value == [] or value == {}:
            continue
        rows.append((key, _readable(key, value)))
    return table(rows, ("", content["path"]))


def _readable(key: str, value: Any) -> str:
    if key == "bytes":
        return human_bytes(value)
    if key in ("parameters", "consumed_tokens", "consumed_samples"):
        return f"{human_count(value)} ({value:,})"
    if isinstance(value, bool):
        return "yes" if value else "NO" if key == "complete" else "no"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if key == "lineage" and isinstance(value, dict):
        return _ancestry(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _ancestry(lineage: dict[str, Any]) -> str:
    """`convert --layer-map dus:8 <- pretrain <- ...` newest first, with the first parents' places."""
    steps = []
    while lineage:
        parents = lineage.get("parents") or []
        place = f" of {parents[0]['path']}" if parents else ""
        steps.append(f"{lineage.get('made_by', lineage.get('stage', '?'))}{place}")
        lineage = (parents[0].get("lineage") or {}) if parents else {}
    return " <- ".join(steps)
