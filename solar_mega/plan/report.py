"""A plan as a person reads it."""

from collections.abc import Sequence

from solar_mega.plan.estimate import Estimate
from solar_mega.plan.search import Found
from solar_mega.runtime.accelerators import needs
from solar_mega.runtime.console import human_bytes, human_count, human_seconds, table

IMBALANCE = 0.03
"""Slowest stage over the mean above which a plan warns."""

BUBBLE = 0.10
FULL = 0.92
"""Share of the memory above which a plan warns."""


def sheet(plan: Estimate) -> str:
    """The whole plan."""
    parts = [_head(plan), _memory(plan)]
    if plan.links:
        parts.append(_communication(plan))
    parts.append(_speed(plan))
    notes = warnings(plan)
    if notes:
        parts.append("\n".join(f"warning: {note}" for note in notes))
    return "\n\n".join(parts)


def _head(plan: Estimate) -> str:
    parallel, train, cluster = plan.cfg.parallel, plan.cfg.train, plan.cluster
    sequence = " (sequence parallel)" if parallel.sequence_parallel else ""
    chunks = f" x vpp {parallel.vpp}" if parallel.vpp > 1 else ""
    optimizer = "sharded over dp" if parallel.distributed_optimizer else "whole on every replica"
    tokens = plan.tokens_per_step * train.steps
    return "\n".join(
        (
            f"model     {plan.arch.num_layers} layers, {human_count(plan.arch.parameters())} parameters "
            f"({plan.arch.parameters():,})",
            f"cluster   {cluster.gpus} x {cluster.gpu.name}, {cluster.gpus_per_node} a node, "
            f"{human_bytes(cluster.gpu.memory)} each",
            f"layout    tp {parallel.tp}{sequence} x pp {parallel.pp}{chunks} x dp {plan.dp}, "
            f"optimizer {optimizer}",
            f"batch     {train.global_batch_size} x {train.seq_length} = {human_count(plan.tokens_per_step)} "
            f"tokens a step: {plan.micro_batches} micro-batches of {train.micro_batch_size} per replica, "
            f"{train.precision}, recompute {train.recompute}",
            f"training  {train.steps} steps, {human_count(tokens)} tokens, "
            f"{plan.flops_per_step * train.steps:.3g} FLOP",
        )
    )


def _memory(plan: Estimate) -> str:
    rows = []
    for number, stage in enumerate(plan.stages):
        memory = stage.memory
        rows.append(
            (
                number,
                _layers(stage.layers),
                human_count(memory.parameters),
                *map(human_bytes, (memory.weights, memory.gradients, memory.optimizer)),
                human_bytes(memory.activations),
                memory.in_flight,
                human_bytes(max(memory.head, memory.working)),
                human_bytes(memory.total),
                f"{(memory.total + plan.cluster.reserve) / plan.cluster.gpu.memory:.0%}",
            )
        )
    headers = (
        "stage",
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "in flight",
        "working",
        "total",
        "of GPU",
    )
    reserve = human_bytes(plan.cluster.reserve)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return (
        f"memory of a rank ({verdict}; `of GPU` includes {reserve} for CUDA, NCCL and fragmentation)\n"
        + table(_merged(rows), headers)
    )


def _layers(chunks: Sequence[str]) -> str:
    return " ".join(chunks if len(chunks) <= 4 else [*chunks[:2], "...", chunks[-1]])


def _merged(rows: Sequence[tuple]) -> list[tuple]:
    """Long pipelines: stages in the middle that are alike but for their layers and place become one row."""
    if len(rows) <= 8:
        return list(rows)
    middle = rows[1:-1]
    return [rows[0], (f"1-{len(rows) - 2}", "...", *middle[0][2:]), rows[-1]]


def _communication(plan: Estimate) -> str:
    rows = [
        (
            link.what,
            link.ranks,
            link.over,
            human_bytes(link.sent),
            human_seconds_fine(link.seconds),
            human_seconds_fine(link.exposed),
        )
        for link in plan.links
    ]
    headers = ("parallelism", "ranks", "link", "sent", "takes", "not hidden")
    return "communication of a rank in a step\n" + table(rows, headers)


def human_seconds_fine(seconds: float) -> str:
    """`3.2ms` below a second, else as human_seconds."""
    return f"{1000 * seconds:.3g}ms" if seconds < 0.9995 else human_seconds(seconds)


def _speed(plan: Estimate) -> str:
    rows = []
    for name, mfu, seconds in (
        (f"stated MFU {plan.cluster.mfu:.0%}", plan.cluster.mfu, plan.stated_seconds),
        (f"estimate, kernels at {plan.cluster.kernel_efficiency:.0%}", plan.estimated_mfu, plan.step_seconds),
    ):
        total = seconds * plan.cfg.train.steps
        rate = plan.tokens_per_step / seconds
        rows.append(
            (
                name,
                f"{mfu:.1%}",
                f"{seconds:.3g}s",
                human_count(rate),
                human_count(rate / plan.cluster.gpus),
                f"{total / 86400:.3g}",
                f"{total / 3600 * plan.cluster.gpus:,.0f}",
            )
        )
    headers = ("speed", "MFU", "step", "tokens/s", "per GPU", "days", "GPU-hours")
    waits = f"pipeline bubble {plan.bubble:.1%}, slowest stage {plan.imbalance:.1%} above the mean"
    return f"{waits}\n{table(rows, headers)}\nneither row was measured; the estimate is for comparing layouts"


def warnings(plan: Estimate) -> list[str]:
    """What the person who planned this should look at."""
    notes = []
    if not plan.fits:
        need = human_bytes(plan.memory + plan.cluster.reserve)
        notes.append(
            f"does not fit: the fullest rank needs {need} of {human_bytes(plan.cluster.gpu.memory)}; "
            "more tp, pp or dp, a smaller micro-batch, or recompute = full (--search finds what fits)"
        )
    elif plan.memory + plan.cluster.reserve > FULL * plan.cluster.gpu.memory:
        notes.append("the fullest rank leaves little room; the working memory is an estimate")
    notes += _imbalance(plan)
    if plan.bubble > BUBBLE:
        notes.append(
            f"the pipeline stands still {plan.bubble:.0%} of the time: {plan.micro_batches} micro-batches "
            f"for {plan.cfg.parallel.pp} stages; more micro-batches, fewer stages, or vpp"
        )
    if plan.cfg.parallel.tp > plan.cluster.gpus_per_node:
        notes.append("tensor parallelism crosses nodes; keep tp within a node")
    return notes + _accelerators(plan)


def _accelerators(plan: Estimate) -> list[str]:
    gpu, kernels = plan.cluster.gpu, plan.cfg.kernels
    notes = [
        f"{need.key} needs compute capability {'.'.join(map(str, need.capability))}, {gpu.name} has "
        f"{'.'.join(map(str, gpu.capability))}; choose {need.otherwise}"
        for need in needs(plan.cfg.parallel, kernels)
        if gpu.capability < need.capability
    ]
    if kernels.fp8 != "off":
        notes.append(f'both speeds are counted at the bf16 peak, kernels.fp8 = "{kernels.fp8}" or not')
    return notes


def _imbalance(plan: Estimate) -> list[str]:
    notes = []
    if len(plan.stages) > 1 and plan.imbalance > IMBALANCE:
        seconds = [stage.seconds for stage in plan.stages]
        slowest = seconds.index(max(seconds))
        why = " (it has the language-model head)" if slowest == len(seconds) - 1 else ""
        notes.append(
            f"stage {slowest}{why} takes {plan.imbalance:.1%} longer than the mean, and the others wait for "
            "it; fewer stages, or layers in more chunks"
        )
    totals = [stage.memory.total for stage in plan.stages]
    if len(totals) > 1 and max(totals) > 1.25 * sum(totals) / len(totals):
        fullest = totals.index(max(totals))
        why = " (embedding, most micro-batches in flight)" if fullest == 0 else ""
        notes.append(
            f"stage {fullest}{why} needs {human_bytes(totals[fullest])}, the mean is "
            f"{human_bytes(sum(totals) / len(totals))}"
        )
    return notes


def ranking(found: Found, count: int) -> str:
    """The best layouts as a table."""
    rows = [
        (
            number,
            *(getattr(plan.cfg.parallel, name) for name in ("tp", "pp", "vpp")),
            plan.dp,
            plan.cfg.train.micro_batch_size,
            plan.cfg.train.recompute,
            human_bytes(plan.memory),
            f"{plan.bubble:.1%}",
            f"{plan.estimated_mfu:.1%}",
            human_count(plan.tokens_per_step / plan.step_seconds),
        )
        for number, plan in enumerate(found.best[:count], start=1)
    ]
    headers = (
        "rank",
        "tp",
        "pp",
        "vpp",
        "dp",
        "micro",
        "recompute",
        "memory",
        "bubble",
        "estimated MFU",
        "tokens/s",
    )
    return f"{len(found.best)} of {found.tried} layouts fit; the best by estimated time\n" + table(
        rows, headers
    )
