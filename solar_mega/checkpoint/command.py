"""Command lines of `convert`, `verify` and `inspect`: Hugging Face directories and Megatron checkpoints, told
apart by what is in them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.config.units import parse_bytes
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import Progress, human_bytes, human_count, human_seconds, say, table

if TYPE_CHECKING:
    from solar_mega.artifact.verify import VerifyReport
    from solar_mega.checkpoint.source import Source
    from solar_mega.depth.layer_map import LayerMap

Precision = Literal["fp32", "bf16", "fp16"]


_MEMORY = 400 << 20
"""Resident bytes of moving bytes: the interpreter, torch where values change, and chunks."""


@dataclass(frozen=True)
class ConvertOptions:
    """Write SRC as DST, through a layer map.

    Each may be a Hugging Face directory or a Megatron distributed checkpoint. DST appears only when it is
    complete; the same command after a kill goes on where it stopped. Neither a GPU nor memory for the model
    is needed. Started with torchrun, processes share the work of routes with a Megatron checkpoint.
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
    """Tensor-parallel ranks of the layout that a Megatron checkpoint is written in; any layout loads it."""

    pp: int = 1
    """Pipeline stages of that layout."""

    zero_copy: bool = False
    """Megatron to Megatron: write an index and link the files instead of copying what they hold."""

    optimizer: Literal["keep", "drop"] = "keep"
    """Megatron to Megatron: whether optimizer states go through the map too, or are left out."""

    hf_config: Path | None = None
    """Hugging Face directory whose config.json and tokenizer belong to SRC, when SRC is a checkpoint that
    another Megatron program wrote."""

    dry_run: bool = False
    """Check everything, print the layer map and sizes, write nothing."""

    config: Path | None = None
    """TOML file with these settings (`src = ...`, `dst = ...`, `layer_map = ...`); the command line wins."""


@dataclass(frozen=True)
class VerifyOptions:
    """Prove that DST is SRC through the layer map, bit for bit. Exit code 1, and the first differing tensor,
    when it is not. Each may be a Hugging Face directory or a Megatron checkpoint; two Megatron checkpoints
    are compared with their optimizer states."""

    src: Positional[Path]
    """What the other was made from: Hugging Face directory, Megatron checkpoint, or a run's directory."""

    dst: Positional[Path]
    """What to check, likewise."""

    layer_map: str = "identity"
    """The map DST was made through."""

    dtype: Precision | None = None
    """The --dtype DST was made with, if it was."""

    hf_config: Path | None = None
    """Hugging Face directory whose config.json belongs to a checkpoint that another Megatron program
    wrote."""

    logits: bool = False
    """Also run both models on the same tokens in fp32, which needs memory for them: two forms of one model
    must agree, and a map that preserves the function must leave every bit of the logits as it was."""


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
    from solar_mega.checkpoint.source import open_foreign, open_source

    foreign = None if options.hf_config else open_foreign(options.src)
    source = foreign or open_source(options.src, "SRC", options.hf_config)
    _check_flags(options, source.kind)
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
        optimizer=options.optimizer,
        zero_copy=options.zero_copy,
    )
    return run(conversion, options.dry_run, Progress)


def _check_flags(options: ConvertOptions, kind: str) -> None:
    """Flags that mean nothing on this route. Raises UserError."""
    problems = Problems()
    if kind == "hf" or options.to == "hf":
        if options.zero_copy:
            problems.add("--zero-copy is from a Megatron checkpoint to a Megatron checkpoint (--to megatron)")
        if options.optimizer != "keep":
            problems.add("--optimizer is from a Megatron checkpoint to a Megatron checkpoint (--to megatron)")
    if kind == "hf" and options.hf_config is not None:
        problems.add("--hf-config belongs to a Megatron checkpoint; SRC is a Hugging Face directory")
    problems.raise_if_any("convert")


def _grow(options: ConvertOptions, src: Path, shard_bytes: int) -> int:
    """Hugging Face to Hugging Face."""
    from solar_mega.artifact.cast import weight_dtype
    from solar_mega.artifact.grow import grow, plan_growth, require_room
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
        require_room(plan, options.dst)
        free = human_bytes(free_bytes(options.dst))
        say(
            f"would write {options.dst}: {len(layer_map)} layers, {human_count(plan.parameters)} parameters, "
            f"{human_bytes(plan.nbytes)} in {_files(plan.shards)}; free there: {free}; memory: at most about "
            f"{human_bytes(_MEMORY)}"
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
    from solar_mega.checkpoint.source import open_foreign, open_source
    from solar_mega.depth.layer_map import LayerMap

    def opened(path: Path, key: str):
        return (None if options.hf_config else open_foreign(path)) or open_source(
            path, key, options.hf_config
        )

    src, dst = opened(options.src, "SRC"), opened(options.dst, "DST")
    dtype = weight_dtype(options.dtype) if options.dtype else None
    layer_map = LayerMap.parse(options.layer_map, _depth(src))
    report = _compare(src, dst, layer_map, dtype)
    say(report.describe())
    if not report.ok or not options.logits:
        return 0 if report.ok else 1
    from solar_mega.checkpoint.verify_logits import verify_logits

    verdict = verify_logits(src, dst, layer_map)
    say(verdict.describe())
    return 0 if verdict.ok else 1


def _depth(source: "Source") -> int:
    if source.config:
        return source.config["num_hidden_layers"]
    from solar_mega.checkpoint.items import CheckpointTensors

    return CheckpointTensors(source.path).layers


def _compare(src: "Source", dst: "Source", layer_map: "LayerMap", dtype: str | None) -> "VerifyReport":
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.artifact.verify import verify as compare

    if src.kind == dst.kind == "hf":
        return compare(HFDirectory(src.path), HFDirectory(dst.path), layer_map, dtype, Progress)
    from solar_mega.checkpoint.verify_megatron import verify_export, verify_import, verify_remapped

    if src.kind == "hf":
        return verify_import(HFDirectory(src.path), dst.path, layer_map, dtype, Progress)
    if dst.kind == "hf":
        if not src.config:
            raise UserError(
                f"{src.path} was not written by solar_mega and has no config; give --hf-config DIR"
            )
        return verify_export(src.path, HFDirectory(dst.path), layer_map, dtype, Progress, src.config)
    return verify_remapped(src.path, dst.path, layer_map, dtype, Progress, src.config or None)


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
