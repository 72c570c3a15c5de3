"""`solar-mega merge`."""

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from solar_mega.config.command_line import RunOptions, parse_options, parse_run
from solar_mega.config.units import parse_bytes
from solar_mega.merge.parents import Parents
from solar_mega.merge.recipe import MergeConfig, Recipe, recipe_of
from solar_mega.runtime.console import Progress, human_bytes, human_count, human_seconds, say

if TYPE_CHECKING:
    from solar_mega.merge.arithmetic import Angle
    from solar_mega.merge.plan import MergePlan


@dataclass(frozen=True)
class MergeOptions(RunOptions):
    """Merge models (Hugging Face directories, Megatron checkpoints) into a new one. --config takes our TOML
    or a mergekit YAML (.yml, .yaml), and every setting of the TOML is also a flag. All arithmetic is fp32,
    streamed; --out appears only when it is complete."""


@dataclass(frozen=True)
class MergekitOptions:
    """Merge Hugging Face models as a mergekit YAML (--config FILE.yml) says."""

    out: Path
    """Directory to write; must not exist, or be empty."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """dtype of the result; default: the file's out_dtype or dtype, or that of the base."""

    seed: int = 0
    """dare_*: seeds what is dropped."""

    shard_size: str = "5GB"
    """Largest safetensors file."""

    threads: int | None = None
    """CPU threads; default: all cores."""

    dry_run: bool = False
    """Check everything, print what would be done, and stop."""


def merge(argv: Sequence[str]) -> int:
    """`solar-mega merge --out DIR ...`"""
    options: MergekitOptions | MergeOptions
    settings: MergekitOptions | MergeConfig
    yaml, words = _take_yaml(argv)
    if yaml is not None:
        options = settings = parse_options(MergekitOptions, words, "merge")
        recipe = _from_yaml(yaml, settings)
    else:
        options, settings = parse_run(MergeOptions, MergeConfig, argv, "merge")
        recipe = recipe_of(settings)
    shard_bytes = parse_bytes(settings.shard_size, "--shard-size")
    with nullcontext() if options.dry_run else Parents(recipe.models) as parents:
        from solar_mega.merge.plan import plan_merge
        from solar_mega.merge.run import check_place
        from solar_mega.merge.run import merge as run_merge

        plan = plan_merge(recipe)
        say(_describe(plan))
        for text in plan.warnings:
            say(f"warning: {text}")
        check_place(plan, settings.out)
        if options.dry_run:
            return 0
        report = run_merge(plan, settings.out, shard_bytes, settings.threads, Progress, parents)
    if report.findings.angles:
        say(_angles(report.findings.angles))
    say(
        f"{report.path}: {report.tensors} tensors, {human_count(report.parameters)} parameters, "
        f"{human_bytes(report.nbytes)}, {human_seconds(report.seconds)}"
    )
    return 0


def _take_yaml(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML file that --config names, and the words without it; None where it names another kind of
    file."""
    words = list(argv)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        end = i + 1 if equals else i + 2
        given = value if equals else "".join(words[i + 1 : end])
        if flag == "--config" and given.lower().endswith((".yml", ".yaml")):
            return Path(given), words[:i] + words[end:]
    return None, words


def _from_yaml(path: Path, options: MergekitOptions) -> Recipe:
    from solar_mega.artifact.cast import weight_dtype
    from solar_mega.merge.mergekit import read_mergekit

    dtype = weight_dtype(options.dtype) if options.dtype else None
    return read_mergekit(path, options.seed, dtype)


def _describe(plan: "MergePlan") -> str:
    names = ", ".join(str(path) for path in plan.models)
    dtypes = "/".join(sorted({job.dtype for job in plan.jobs}))
    return (
        f"{plan.recipe.method} of {names}: {plan.layers} layers, {len(plan.jobs)} tensors, "
        f"{human_count(plan.parameters)} parameters, {human_bytes(plan.nbytes)} as {dtypes}"
    )


def _angles(angles: "Sequence[Angle]") -> str:
    """One screen about the arcs: how wide they are, and which tensors were interpolated linearly."""
    from math import degrees

    wide = sorted(degrees(angle.theta) for angle in angles)
    straight = [angle.name for angle in angles if angle.lerp]
    spread = f"{wide[0]:.2f} to {wide[-1]:.2f} degrees, median {statistics.median(wide):.2f}"
    line = f"angle between the two: {spread}; "
    if not straight:
        return line + "no tensor was so parallel that it had to be interpolated linearly"
    line += f"{len(straight)} of {len(angles)} tensors interpolated linearly (|cos| > 0.9995 or zero)"
    if len(straight) > len(angles) / 2:
        line += ": for siblings slerp is nearly the average; delta_slerp from their base is not"
    return line
