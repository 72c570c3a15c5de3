"""`solar-mega bench dpo`: time and peak memory of a DPO loss from hidden states, forward and backward.

The part of a DPO step behind the decoder: head, log-probs of the given tokens, loss, and the gradients of
hidden states and head. Ours never holds all logits: pair by pair (linear_dpo_loss), or for pairs of any
length with logits computed twice (linear_token_logprob and dpo_loss). Beside it: all logits at once with
PyTorch's log_softmax (as TRL), that under torch.compile, our token log-prob on all logits, Liger's fused
loss. The reference model's log-probs are given to all but Liger, whose loss takes that model's hidden states
and head and computes them: its extra forward is part of what it costs.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solar_mega import ops
from solar_mega.bench import measure
from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import Problems
from solar_mega.model.builder import DTYPES
from solar_mega.ops.linear_token_logprob import linear_token_logprob
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import human_bytes, say, table

BETA = 0.1


@dataclass(frozen=True)
class DPOBench:
    """Time and peak memory of the DPO loss from hidden states: ours, all logits at once, installed peers."""

    pairs: int | None = None
    """Preference pairs; each is two responses. Default: 16 on a GPU, 8 on a CPU."""
    length: int | None = None
    """Tokens per response; default: 1024 on a GPU, 128 on a CPU."""
    hidden: int | None = None
    """Hidden size; default: 4096 on a GPU, 1024 on a CPU."""
    vocab: int = 32000
    precision: Literal["fp32", "bf16"] | None = None
    """Default: bf16 on a GPU, fp32 on a CPU."""
    max_logits_mib: int | None = None
    """Bound on the logits that ours holds at a time, in MiB; default: 1/8 of all logits."""
    providers: tuple[str, ...] = ()
    """Only these beside ours; default: all that are installed."""
    rounds: int = 7
    """Timed calls of each, in turns."""
    limit: float = 20.0
    """Seconds per provider after which three calls must do."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    out: Path | None = None
    """Write the result as JSON to this file."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, chosen and rejected in turn; the first quarter, a prompt, does not count."""

    hidden: Tensor
    """[2 pairs · length, h]"""
    weight: Tensor
    """[V, h]"""
    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    ends: list[int]
    """cu_seqlens, as a data loader knows them."""
    reference_logps: Tensor
    """[2 pairs] fp64."""
    reference_hidden: Tensor
    reference_weight: Tensor
    max_logits_bytes: int

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""Batch, hidden, weight -> scalar loss."""

# ---------------------------------------------------------------------------------------------- providers


def _ours(b: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return ops.linear_dpo_loss(
        hidden,
        weight,
        b.targets,
        b.ends,
        mask=b.mask,
        reference_logps=b.reference_logps,
        beta=BETA,
        max_logits_bytes=b.max_logits_bytes,
    ).loss


def _ours_any_length(b: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    logps = linear_token_logprob(hidden, weight, b.targets, mask=b.mask, max_logits_bytes=b.max_logits_bytes)
    return ops.dpo_loss(logps, b.cu_seqlens, mask=b.mask, reference_logps=b.reference_logps, beta=BETA).loss


def _ours_full_logits(b: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    logps = ops.token_logprob(hidden @ weight.t(), b.targets, mask=b.mask, inplace_backward=True)
    return ops.dpo_loss(logps, b.cu_seqlens, mask=b.mask, reference_logps=b.reference_logps, beta=BETA).loss


def _full_logits(b: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """As TRL without Liger: logits of all positions, log_softmax in fp32, sums over the counted tokens."""
    logits = hidden @ weight.t()
    logps = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logps = logps.gather(-1, b.targets[:, None]).squeeze(-1)
    sums = (logps * b.mask).view(b.reference_logps.numel(), -1).sum(-1)
    ratio = sums - b.reference_logps.to(sums.dtype)
    return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()


def _liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False)

    def loss(b: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        def rows(t: Tensor) -> Tensor:
            return t.view(b.reference_logps.numel(), -1, *t.shape[1:])

        targets = torch.where(b.mask, b.targets, -100)
        given = function(
            weight,
            rows(hidden),
            rows(targets),
            ref_input=rows(b.reference_hidden),
            ref_weight=b.reference_weight,
        )
        return given[0]

    return loss


def chosen_first(b: Batch) -> tuple[Batch, Tensor]:
    """Liger's order, all chosen responses and then all rejected ones; and where each row was before."""
    rows = torch.arange(b.hidden.shape[0], device=b.hidden.device).view(b.reference_logps.numel(), -1)
    order = torch.cat([rows[0::2], rows[1::2]]).flatten()
    names = ("hidden", "targets", "mask", "reference_hidden")
    return replace(b, **{name: getattr(b, name)[order] for name in names}), order


LOADERS: dict[str, Callable[[], Loss]] = {
    "solar_mega": lambda: _ours,
    "solar_mega, any length": lambda: _ours_any_length,
    "solar_mega, all logits": lambda: _ours_full_logits,
    "torch eager, all logits": lambda: _full_logits,
    "torch.compile, all logits": lambda: torch.compile(_full_logits, dynamic=False),
    "liger": _liger,
}

# ---------------------------------------------------------------------------------------------- run


def run(options: DPOBench) -> dict[str, Any]:
    """Measure, print a table, return (and write) the report. Raises UserError for unknown names or sizes."""
    _check(options)
    with ranks.running(ParallelConfig(), threads=options.threads):
        device = ranks.device()
        batch = _draw(options, device)
        entries = _measure(batch, options, device)
        report = measure.surroundings(device) | {"bench": "dpo", "shape": _shape(batch), "providers": entries}
    _print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _check(o: DPOBench) -> None:
    problems = Problems()
    if unknown := [name for name in o.providers if name not in LOADERS]:
        problems.add(f"--providers {' '.join(unknown)}: unknown; allowed: {', '.join(LOADERS)}")
    for name in ("pairs", "length", "hidden", "vocab", "max_logits_mib", "rounds"):
        value = getattr(o, name)
        if value is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')} {value}: must be at least 1")
    problems.raise_if_any("bench dpo")


def _draw(o: DPOBench, device: torch.device) -> Batch:
    gpu = device.type == "cuda"
    dtype = DTYPES[o.precision or ("bf16" if gpu else "fp32")]
    length, width = o.length or (1024 if gpu else 128), o.hidden or (4096 if gpu else 1024)
    pairs = o.pairs or (16 if gpu else 8)
    tokens = 2 * pairs * length
    torch.manual_seed(0)

    def head() -> Tensor:
        return torch.randn(o.vocab, width, device=device).mul_(2 * width**-0.5).to(dtype)

    hidden, weight = torch.randn(tokens, width, device=device).to(dtype), head()
    targets = torch.randint(o.vocab, (tokens,), device=device)
    mask = torch.arange(tokens, device=device) % length >= length // 4
    ends = [length * sequence for sequence in range(2 * pairs + 1)]
    cu_seqlens = torch.tensor(ends, device=device, dtype=torch.int32)
    reference_hidden, reference_weight = torch.randn(tokens, width, device=device).to(dtype), head()
    logps = linear_token_logprob(reference_hidden, reference_weight, targets, mask=mask)
    sums = ops.dpo_loss(logps, cu_seqlens, mask=mask).sums
    bound = (o.max_logits_mib or 0) * 2**20 or tokens * o.vocab * dtype.itemsize // 8
    return Batch(
        hidden, weight, targets, mask, cu_seqlens, ends, sums, reference_hidden, reference_weight, bound
    )


def _shape(b: Batch) -> dict[str, Any]:
    tokens, width = b.hidden.shape
    return {
        "tokens": tokens,
        "pairs": b.reference_logps.numel() // 2,
        "hidden": width,
        "vocab": b.weight.shape[0],
        "dtype": str(b.hidden.dtype).removeprefix("torch."),
        "logits_bytes": tokens * b.weight.shape[0] * b.hidden.element_size(),
        "max_logits_bytes": b.max_logits_bytes,
    }


def _measure(batch: Batch, o: DPOBench, device: torch.device) -> dict[str, dict[str, Any]]:
    exact = _step(_full_logits, _fp64(batch))()
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name, load in LOADERS.items():
        if o.providers and name not in ("solar_mega", *o.providers):
            continue
        try:
            given, order = chosen_first(batch) if name == "liger" else (batch, None)
            call = _step(load(), given)
            got = call()
            if order is not None:
                got = (got[0], torch.empty_like(got[1]).index_copy_(0, order, got[1]), got[2])
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
            entry = {"error": max(errors), "loss": got[0].item(), "problem": None}
            entry["repeatable"] = all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))
            del got
            entry["extra_bytes"] = measure.extra_memory(call, device)
            # The gradients are results that everybody must return.
            entry["working_bytes"] = entry["extra_bytes"] - batch.hidden.nbytes - batch.weight.nbytes
            entry["resident_bytes"] = measure.resident_growth(call) if device.type == "cpu" else None
            entries[name], calls[name] = entry, call
        except ImportError:
            entries[name] = {"problem": "not installed"}
        except Exception as error:  # a peer's own trouble is a result
            entries[name] = {"problem": f"{type(error).__name__}: {error}"[:200]}
    del exact
    seconds = measure.in_turns({n: _same(c) for n, c in calls.items()}, o.rounds, o.limit, device)
    for name, values in seconds.items():
        entries[name]["seconds"] = asdict(measure.timing(values))
        if "solar_mega" in seconds:
            paired = zip(values, seconds["solar_mega"], strict=True)
            entries[name]["ours_is_times_as_fast"] = statistics.median(a / b for a, b in paired)
    return entries


def _step(loss: Loss, batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    """Loss, and the gradients of hidden states and head."""

    def step() -> tuple[Tensor, ...]:
        hidden, weight = batch.leaves()
        value = loss(batch, hidden, weight)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    return step


def _same(call: Callable[[], Any]) -> Callable[[int], Callable[[], Any]]:
    return lambda number: call


def _fp64(b: Batch) -> Batch:
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(b).items()
    }
    return Batch(**wide)


def _print(report: dict[str, Any]) -> None:
    shape, entries = report["shape"], report["providers"]
    say(
        f"{report['device']}: {shape['pairs']} pairs, {shape['tokens']} tokens, hidden {shape['hidden']}, "
        f"vocabulary {shape['vocab']}, {shape['dtype']}; all logits {human_bytes(shape['logits_bytes'])}, "
        f"ours at most {human_bytes(shape['max_logits_bytes'])} at a time"
    )
    mine = entries.get("solar_mega", {}).get("working_bytes")
    rows = []
    for name, e in entries.items():
        if e["problem"] is not None:
            say(f"  {name}: {e['problem']}")
            continue
        working = human_bytes(e["working_bytes"])
        times = f"{e['working_bytes'] / mine:.1f}" if mine else "-"
        resident = "-" if e["resident_bytes"] is None else human_bytes(e["resident_bytes"])
        p50 = e["seconds"]["p50"]
        speed = f"{e['ours_is_times_as_fast']:.2f}" if "ours_is_times_as_fast" in e else "-"
        error, bits = f"{e['error']:.1e}", "yes" if e["repeatable"] else "no"
        rows.append(
            (
                name,
                f"{p50 * 1e3:.1f}",
                speed,
                human_bytes(e["extra_bytes"]),
                working,
                times,
                resident,
                error,
                bits,
            )
        )
    headers = (
        "loss + gradients",
        "p50 ms",
        "ours ×",
        "extra",
        "beside gradients",
        "of ours",
        "resident",
        "error",
        "same bits",
    )
    say(table(rows, headers))
