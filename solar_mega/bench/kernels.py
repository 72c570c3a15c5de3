"""`solar-mega bench kernels`: our ops beside PyTorch's and those of installed peers, against the roofline.

Per operation and provider: time, GB/s from the floor bytes (the fewest that must move, one formula for
every provider), that as a share of the copy bandwidth measured in the same run, extra memory, error against
fp64 and whether two runs agree to the bit. See measure.py for how, cases.py for what, peers.py for whom.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from solar_mega.bench import measure
from solar_mega.bench.cases import OPERATIONS, Formula, Inputs, Mode, Operation, Shape, call_for, fp64
from solar_mega.bench.measure import Timing
from solar_mega.bench.peers import PEERS
from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import Problems
from solar_mega.model.builder import DTYPES
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_bytes, say, table

OURS = "solar_mega"


@dataclass(frozen=True)
class KernelBench:
    """Time our kernels beside PyTorch's and those of installed peers, against the memory roofline."""

    ops: tuple[str, ...] = tuple(OPERATIONS)
    """Which operations."""
    providers: tuple[str, ...] = ()
    """Only these beside ours (names as in the table; default: all that are installed)."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the tensors; default: bf16 on a GPU, fp32 on a CPU."""
    tokens: int | None = None
    """Rows of every operation; default: 8192 on a GPU, 2048 on a CPU."""
    hidden: int = 4096
    ffn: int = 14336
    """Width of swiglu's output."""
    vocab: int = 32000
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    head_hidden: int | None = None
    """Hidden size of linear_token_logprob; default: `hidden` on a GPU, 1024 on a CPU."""
    pairs: int = 8
    """Preference pairs of dpo_loss, tokens / pairs / 2 tokens each response."""
    rounds: int = 20
    """Timed calls of each provider."""
    limit: float = 4.0
    """Seconds per operation and provider, after which three calls must do."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    rotate: int = 1_000_000_000
    """Bytes of inputs to rotate through at most (wanted are three times the last-level cache)."""
    out: Path | None = None
    """Write the result as JSON to this file."""
    plot: Path | None = None
    """Draw GB/s against the roofline into this file; needs matplotlib."""


@dataclass
class Result:
    """One provider on one operation; rates derived in `_report`."""

    operation: str
    mode: str
    provider: str
    problem: str | None = None
    """Why there are no figures: not installed, or what went wrong."""
    graph: Timing | None = None
    """GPU time alone, from CUDA graph replays."""
    eager: Timing | None = None
    seconds: list[float] = field(default_factory=list)
    """The rounds behind `eager`, in order: paired with the other providers' rounds."""
    extra_bytes: int | None = None
    error: float | None = None
    """Largest over the outputs of |out - fp64| / |fp64|, in the Frobenius norm."""
    repeatable: bool | None = None
    """Two calls on the same inputs agree to the bit."""


def run(options: KernelBench) -> dict:
    """Measure, print a table, return (and write) the report. Raises UserError for unknown names or sizes."""
    _check(options)
    with ranks.running(ParallelConfig(), threads=options.threads):
        device = ranks.device()
        shape = _shape(options, device)
        facts = measure.surroundings(device)
        copied = 2**30 if device.type == "cuda" else 2**28
        copies = [measure.copy_bandwidth(device, copied)]
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        results: list[Result] = []
        with torch.cuda.stream(stream):  # captures need one that is not the default; None changes nothing
            for name in options.ops:
                results += _measure_operation(OPERATIONS[name], shape, options, device)
                # The roof is the fastest of the run's copies: a busy machine only makes them slower.
                copies.append(measure.copy_bandwidth(device, copied))
                report = _report(facts, shape, copies, results, device)
                _write(report, options.out)  # whoever cuts us short keeps what there is
    _print(report)
    if options.plot is not None:
        from solar_mega.bench.plot import draw_roofline

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_roofline(report, options.plot)
    return report


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def _check(o: KernelBench) -> None:
    problems = Problems()
    if not o.ops:
        problems.add(f"--ops: none given; allowed: {' '.join(OPERATIONS)}")
    if unknown := [name for name in o.ops if name not in OPERATIONS]:
        problems.add(f"--ops {' '.join(unknown)}: unknown; allowed: {' '.join(OPERATIONS)}")
    known = {name for op in OPERATIONS.values() for name in (*op.providers, *PEERS[op.name])} | {
        "torch.compile"
    }
    if unknown := [name for name in o.providers if name not in known]:
        problems.add(f"--providers {' '.join(unknown)}: unknown; allowed: {', '.join(sorted(known))}")
    for name in (
        "tokens",
        "hidden",
        "ffn",
        "vocab",
        "heads",
        "kv_heads",
        "head_dim",
        "head_hidden",
        "pairs",
        "rounds",
    ):
        value = getattr(o, name)
        if value is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if o.kv_heads > 0 and o.heads % o.kv_heads:
        problems.add(f"--heads {o.heads} must be a multiple of --kv-heads {o.kv_heads}")
    if o.head_dim % 2:
        problems.add(f"--head-dim {o.head_dim} must be even")
    if o.tokens is not None and o.pairs > 0 and o.tokens < 2 * o.pairs:
        problems.add(f"--tokens {o.tokens} must be at least 2 per pair, --pairs {o.pairs}")
    problems.raise_if_any("bench kernels")


def _shape(o: KernelBench, device: torch.device) -> Shape:
    gpu = device.type == "cuda"
    dtype = DTYPES[o.precision or ("bf16" if gpu else "fp32")]
    tokens = o.tokens or (8192 if gpu else 2048)
    head_hidden = o.head_hidden or (o.hidden if gpu else min(o.hidden, 1024))
    return Shape(
        tokens, o.hidden, o.ffn, o.vocab, o.heads, o.kv_heads, o.head_dim, head_hidden, o.pairs, dtype
    )


def _formulas(operation: Operation, o: KernelBench) -> tuple[dict[str, Formula], dict[str, str]]:
    """Name -> formula of those that can be had, and name -> reason of those that cannot."""
    formulas, missing = dict(operation.providers), {}
    formulas["torch.compile"] = torch.compile(operation.providers["torch eager"], dynamic=False)
    for name, load in PEERS[operation.name].items():
        try:
            formulas[name] = load()
        except ImportError:
            missing[name] = "not installed"
        except Exception as error:  # a peer's own trouble is a result, not ours
            missing[name] = _brief(error)
    if o.providers:
        wanted = {OURS, *o.providers}
        formulas = {name: f for name, f in formulas.items() if name in wanted}
        missing = {name: reason for name, reason in missing.items() if name in wanted}
    return formulas, missing


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def _measure_operation(
    operation: Operation, shape: Shape, o: KernelBench, device: torch.device
) -> list[Result]:
    formulas, missing = _formulas(operation, o)
    torch.manual_seed(0)
    first = operation.draw(shape, device)
    size = sum(first[name].nbytes for name in operation.leaves)
    wanted = max(2, math.ceil(3 * measure.cache_bytes(device) / size))
    sets = [first] + [
        operation.draw(shape, device) for _ in range(min(wanted, max(2, o.rotate // size), 64) - 1)
    ]
    results = []
    for mode in operation.modes:
        began = time.perf_counter()
        found = [Result(operation.name, mode.name, name, problem=reason) for name, reason in missing.items()]
        skipped = operation.backward_only if mode.name == "forward" else frozenset()
        usable = {name: formula for name, formula in formulas.items() if name not in skipped}
        found = [*_measure_mode(operation, mode, usable, sets, o, device), *found]
        results += found
        measured = sum(r.problem is None for r in found)
        say(f"{operation.name} {mode.name}: {measured} providers in {time.perf_counter() - began:.0f} s")
    return results


def _measure_mode(
    operation: Operation,
    mode: Mode,
    formulas: dict[str, Formula],
    sets: list[Inputs],
    o: KernelBench,
    device: torch.device,
) -> list[Result]:
    exact = call_for(operation, operation.reference, mode.name, fp64(sets[0]))()
    results, calls = [], {}
    for name, formula in formulas.items():
        result = Result(operation.name, mode.name, name)
        results.append(result)
        try:
            _judge(result, operation, formula, sets[0], exact, device)
            calls[name] = _prepared(operation, formula, name, mode.name, sets)
        except Exception as error:  # as in _formulas; ours too, so that the others are still measured
            result.problem = _brief(error)
    del exact
    seconds = measure.in_turns(calls, o.rounds, o.limit, device) if calls else {}
    for result in results:
        if result.provider not in seconds:
            continue
        result.seconds = seconds[result.provider]
        result.eager = measure.timing(result.seconds)
        if device.type == "cuda":
            _time_graph(result, calls[result.provider], len(sets), o)
    return results


def _prepared(operation: Operation, formula: Formula, name: str, mode: str, sets: list[Inputs]):
    """Round -> a call on one of the input sets, made on the spot: only one forward's results are kept."""
    if name in operation.overwriting:
        sets = [{key: value.clone() for key, value in inputs.items()} for inputs in sets]
    return lambda number: call_for(operation, formula, mode, sets[number % len(sets)])


def _judge(
    result: Result,
    operation: Operation,
    formula: Formula,
    inputs: Inputs,
    exact: tuple[torch.Tensor, ...],
    device: torch.device,
) -> None:
    """Error, repeatability and memory, on copies: some providers overwrite their inputs."""

    def call() -> Callable[[], tuple[torch.Tensor, ...]]:
        return call_for(operation, formula, result.mode, {k: v.clone() for k, v in inputs.items()})

    once = call()()
    errors = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-300)).item()
        for a, b in zip(once, exact, strict=True)
    ]
    result.error = max(errors)
    result.repeatable = all(torch.equal(a, b) for a, b in zip(once, call()(), strict=True))
    del once
    result.extra_bytes = measure.extra_memory(call(), device)


def _time_graph(result: Result, prepare: Callable[[int], Callable], sets: int, o: KernelBench) -> None:
    try:
        calls = [prepare(number) for number in range(sets)]
        for call in calls:
            call()
        result.graph = measure.timing(measure.graph_replays(calls, o.rounds))
    except Exception as error:  # not every peer can be captured
        result.problem = f"no graph: {_brief(error)}"


def _report(
    facts: dict[str, Any], shape: Shape, copies: list[float], results: list[Result], device: torch.device
) -> dict[str, Any]:
    roof = max(copies)
    modes = {(op.name, mode.name): mode for op in OPERATIONS.values() for mode in op.modes}
    ours = {(r.operation, r.mode): r for r in results if r.provider == OURS}
    entries = []
    for r in results:
        mode, mine = modes[r.operation, r.mode], ours.get((r.operation, r.mode))
        entry = asdict(r)
        del entry["seconds"]
        entry |= {"graph": measure.as_json(r.graph), "eager": measure.as_json(r.eager)}
        best = r.graph or r.eager
        if best is not None:
            if mode.floor_bytes is not None:
                entry["bytes_per_second"] = mode.floor_bytes(shape) / best.p50
                entry["share_of_copy"] = entry["bytes_per_second"] / roof
            if mode.flops is not None:
                entry["flops_per_second"] = mode.flops(shape) / best.p50
            if mine is not None and mine.eager is not None:
                entry["ours_is_times_as_fast"] = _ratio(r, mine)
        entries.append(entry)
    floors = {
        f"{op} {mode}": {"bytes": m.floor_bytes(shape) if m.floor_bytes else None, "counted": m.counted}
        for (op, mode), m in modes.items()
        if (op, mode) in {(r.operation, r.mode) for r in results}
    }
    return facts | {
        "bench": "kernels",
        "shape": asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")},
        "copy_bytes_per_second": roof,
        "copies": copies,
        "cache_bytes": measure.cache_bytes(device),
        "timed_by": "CUDA graph replays" if device.type == "cuda" else "calls in turns",
        "floors": floors,
        "results": entries,
    }


def _ratio(other: Result, mine: Result) -> float:
    if other.graph is not None and mine.graph is not None:
        return other.graph.p50 / mine.graph.p50
    return statistics.median(a / b for a, b in zip(other.seconds, mine.seconds, strict=True))


def _print(report: dict[str, Any]) -> None:
    roof = report["copy_bytes_per_second"]
    say(f"{report['device']}, copy {roof / 1e9:.1f} GB/s (read + written), {report['shape']['dtype']}")
    rows, absent = [], {}
    for r in report["results"]:
        best = r["graph"] or r["eager"]
        if best is None:
            absent.setdefault(f"{r['provider']}: {r['problem']}", []).append(f"{r['operation']} {r['mode']}")
            continue
        rate = r.get("bytes_per_second")
        flops = f"{r['flops_per_second'] / 1e9:.0f} GFLOP/s" if "flops_per_second" in r else "-"
        rows.append(
            (
                f"{r['operation']} {r['mode']}",
                r["provider"],
                f"{best['p50'] * 1e6:.1f}",
                f"{best['p20'] * 1e6:.1f}",
                f"{best['p80'] * 1e6:.1f}",
                f"{rate / 1e9:.1f}" if rate else flops,
                f"{100 * r['share_of_copy']:.0f}%" if rate else "-",
                human_bytes(r["extra_bytes"]),
                f"{r['error']:.1e}",
                "yes" if r["repeatable"] else "no",
                f"{r.get('ours_is_times_as_fast', math.nan):.2f}",
            )
        )
    headers = (
        "op",
        "provider",
        "p50 µs",
        "p20",
        "p80",
        "GB/s",
        "of copy",
        "extra",
        "error",
        "same bits",
        "ours ×",
    )
    say(table(rows, headers))
    for reason, where in absent.items():
        say(f"  {reason} ({', '.join(where)})")
