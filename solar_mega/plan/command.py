"""Command line of `plan`: what a run will need, before the first GPU-hour."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from solar_mega.config.check import TrainingConfig, check_run
from solar_mega.config.command_line import parse_run, toml_of
from solar_mega.config.kinds import config_class, kind_of
from solar_mega.config.load import load_config
from solar_mega.config.units import parse_bytes
from solar_mega.errors import Problems, UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.plan.estimate import Cluster, Estimate, estimate
from solar_mega.runtime.console import say


@dataclass(frozen=True)
class PlanOptions:
    """Parameters, memory of every rank, communication, tokens/s and days of a training on a cluster, from its
    configuration alone. Needs no GPU, no weights and no data: the model's config.json is enough."""

    config: Path | None = None
    """TOML file of a training; `--section.key value` overrides what it says. `--model.path` may name any
    directory with a config.json in it."""

    gpus: int | None = None
    """GPUs in all; default: parallel.tp * parallel.pp * parallel.dp."""

    gpu: str = "h100"
    """h100, h100-pcie, h200, a100, a100-40gb or b200."""

    mfu: float = 0.45
    """Share of the GPUs' peak that whole steps reach, as you state it: days and GPU-hours follow from it."""

    kernel_efficiency: float = 0.6
    """Share of the peak that kernels are assumed to reach while they run, for the estimate that compares
    layouts."""

    gpus_per_node: int = 8
    """GPUs joined by NVLink."""

    network_gbit: float | None = None
    """Gbit/s between nodes per GPU; default: the usual server's (400 for h100, h200 and b200, 200 else)."""

    reserve: str = "8GB"
    """Memory of a GPU kept for the CUDA context, NCCL's buffers and fragmentation."""

    search: bool = False
    """Try all layouts, show the best that fit, and plan the best."""

    top: int = 10
    """Layouts that --search shows."""

    json: bool = False
    """Print JSON instead of tables."""


def plan(argv: Sequence[str]) -> int:
    """`solar-mega plan --config x.toml --gpus N`; 1 when it does not fit."""
    toml = toml_of(argv)
    verb = "pretrain" if toml is None else kind_of(toml)
    if toml is not None and "parallel" not in config_class(verb).__dataclass_fields__:
        return _nothing_to_plan(verb, toml)
    options, cfg = parse_run(PlanOptions, config_class(verb), argv, "plan")
    arch = architecture_of(cfg)
    if cfg.train.steps == 0:  # as many as the data takes, and the data is not read
        if not options.json:
            say("train.steps = 0: days and GPU-hours are those of a thousand steps\n")
        cfg = replace(cfg, train=replace(cfg.train, steps=1000))
    parallel = cfg.parallel
    gpus = options.gpus or parallel.tp * parallel.pp * (parallel.dp or 1)
    cluster = _cluster(options, gpus)
    if options.search:
        return _search(options, cfg, arch, cluster)
    cfg = replace(cfg, parallel=replace(parallel, dp=None))  # --gpus decides
    check_run(cfg, gpus)
    check_layout(arch, cfg.parallel, cfg.train.seq_length).raise_if_any("the model does not fit the layout")
    found = estimate(cfg, arch, cluster)
    _print(found, options)
    return 0 if found.fits else 1


def _nothing_to_plan(verb: str, toml: Path) -> int:
    """A configuration that trains nothing is read, so that its mistakes show, and sent to its verb."""
    load_config(config_class(verb), toml)
    say(f"{toml} configures {verb}, which needs no plan; its settings are valid")
    return 0


def architecture_of(cfg: TrainingConfig) -> Architecture:
    """The decoder at the depth trained."""
    from solar_mega.checkpoint.source import open_source
    from solar_mega.depth.layer_map import LayerMap

    source = open_source(cfg.model.path)
    base = Architecture.from_hf(source.config, f"{source.path}/config.json")
    return base.grown(LayerMap.parse(cfg.model.layer_map, base.num_layers))


def _cluster(options: PlanOptions, gpus: int) -> Cluster:
    from solar_mega.runtime.gpus import find_gpu

    gpu = find_gpu(options.gpu)
    problems = Problems()
    for flag, value, most in (
        ("--gpus", gpus, float("inf")),
        ("--gpus-per-node", options.gpus_per_node, float("inf")),
        ("--top", options.top, float("inf")),
        ("--mfu", options.mfu, 1),
        ("--kernel-efficiency", options.kernel_efficiency, 1),
        ("--network-gbit", options.network_gbit, float("inf")),
    ):
        if value is not None and not 0 < value <= most:
            problems.add(f"{flag} {value}: must be above 0" + (f", at most {most}" if most == 1 else ""))
    problems.raise_if_any("plan")
    network = gpu.network if options.network_gbit is None else options.network_gbit * 1e9 / 8
    return Cluster(
        gpus=gpus,
        gpu=gpu,
        gpus_per_node=options.gpus_per_node,
        network=network,
        reserve=parse_bytes(options.reserve, "--reserve"),
        mfu=options.mfu,
        kernel_efficiency=options.kernel_efficiency,
    )


def _search(options: PlanOptions, cfg: TrainingConfig, arch: Architecture, cluster: Cluster) -> int:
    from solar_mega.plan.report import ranking
    from solar_mega.plan.search import search

    found = search(cfg, arch, cluster)
    if found.smallest is None:
        raise UserError(
            f"--gpus {cluster.gpus}: no layout divides {arch.num_layers} layers, "
            f"train.global_batch_size = {cfg.train.global_batch_size} and the GPUs; change one of them"
        )
    if not found.best:
        say(f"none of {found.tried} layouts fits; the smallest:\n")
        _print(found.smallest, options)
        return 1
    if options.json:
        plans = [plan.to_json() for plan in found.best[: options.top]]
        say(json.dumps({"tried": found.tried, "fit": len(found.best), "best": plans}, indent=2))
        return 0
    say(ranking(found, options.top) + "\n")
    _print(found.best[0], options)
    say("\n" + _settings(found.best[0]))
    return 0


def _settings(found: Estimate) -> str:
    parallel, train = found.cfg.parallel, found.cfg.train
    words = {
        "parallel.tp": parallel.tp,
        "parallel.pp": parallel.pp,
        "parallel.vpp": parallel.vpp,
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "train.micro_batch_size": train.micro_batch_size,
        "train.recompute": train.recompute,
    }
    return "as flags: " + " ".join(f"--{key} {value}" for key, value in words.items())


def _print(found: Estimate, options: PlanOptions) -> None:
    from solar_mega.plan.report import sheet

    say(json.dumps(found.to_json(), indent=2) if options.json else sheet(found))
