"""`solar-mega bench step`: one training step, ours beside the peers, in one process on the same batch.

Peers: transformers with torch's AdamW (fused, as its Trainer defaults to), megatron-core's own local layer
spec with the optimizer it picks itself, and "reference": ours with every kernel switched to PyTorch. All
start from the same weights. Steps are taken in turns, one of each per round, so that a busy machine slows all
alike; the figure is the median over rounds of the paired ratio.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from solar_mega.checkpoint.from_hf import load_weights
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.checkpoint.random_weights import RandomWeights
from solar_mega.config.schema import KernelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.builder import DTYPES, build_model
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import Progress, say, table
from solar_mega.train.optimizer import build_optimizer, build_schedule, wrap
from solar_mega.train.step import NEXT_TOKEN, Objective, Trainer


@dataclass(frozen=True)
class StepBench:
    """Time one training step of this project, of transformers and of stock megatron-core, paired in one
    run."""

    layers: int = 8
    """Decoder layers."""
    hidden: int = 512
    ffn: int = 1536
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 4096
    seq_length: int = 512
    """Tokens per sample."""
    batch: int = 2
    """Samples per step (one micro-batch)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 trains over fp32 master weights; transformers then runs fp32 weights under bf16 autocast."""
    rounds: int = 15
    """Timed rounds, after three untimed ones."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    peers: tuple[str, ...] = ("transformers", "megatron")
    """Beside ours."""
    profile: bool = False
    """Say where our step's time goes, operation by operation."""
    out: Path | None = None
    """Write the result as JSON to this file."""


Step = Callable[[torch.Tensor], float]
"""[b, s + 1] tokens -> loss; one whole step: forward, backward, clip, update."""


@dataclass
class Result:
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)


def run(options: StepBench) -> dict:
    """Run the benchmark, print a table, return (and write) the result. Raises UserError for an unknown
    peer."""
    unknown = set(options.peers) - set(_BUILDERS)
    if unknown:
        raise UserError(f"--peers {' '.join(sorted(unknown))}: unknown; allowed: {' '.join(_BUILDERS)}")
    with ranks.running(ParallelConfig(), threads=options.threads):
        arch = architecture(options)
        steps = {name: _BUILDERS[name](arch, options) for name in ("solar_mega", *options.peers)}
        measured = _measure(steps, arch, options)
        report = _report(measured, arch, options)
        if options.profile:
            report["profile"] = _profile(steps["solar_mega"], arch, options)
    if options.out is not None:
        import json

        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def architecture(o: StepBench) -> Architecture:
    """A Llama of the shape given."""
    return Architecture.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": o.layers,
            "hidden_size": o.hidden,
            "intermediate_size": o.ffn,
            "num_attention_heads": o.heads,
            "num_key_value_heads": o.kv_heads,
            "vocab_size": o.vocab,
            "max_position_embeddings": o.seq_length,
        },
        "the shape given",
    )


def _measure(steps: dict[str, Step], arch: Architecture, o: StepBench) -> Result:
    generator = torch.Generator().manual_seed(0)
    result = Result({name: [] for name in steps}, {name: [] for name in steps})
    warm_up = 3
    with Progress((o.rounds + warm_up) * len(steps), "steps", "bench step") as progress:
        for number in range(o.rounds + warm_up):
            tokens = torch.randint(arch.vocab_size, (o.batch, o.seq_length + 1), generator=generator)
            tokens = tokens.to(ranks.device())
            names = list(steps)
            names = names[number % len(names) :] + names[: number % len(names)]  # no fixed place in the round
            for name in names:
                _synchronize()
                start = time.perf_counter()
                loss = steps[name](tokens)
                _synchronize()
                if number >= warm_up:
                    result.seconds[name].append(time.perf_counter() - start)
                result.losses[name].append(loss)
                progress.advance(1)
    return result


def _report(measured: Result, arch: Architecture, o: StepBench) -> dict:
    tokens = o.batch * o.seq_length
    ours = measured.seconds["solar_mega"]
    rows, providers = [], {}
    for name, seconds in measured.seconds.items():
        ratio = statistics.median(t / mine for t, mine in zip(seconds, ours, strict=True))
        rate = tokens / statistics.median(seconds)
        providers[name] = {
            "tokens_per_second": round(rate, 1),
            "median_seconds": round(statistics.median(seconds), 5),
            "ours_over_this": round(ratio, 4),
            "tflops": round(rate * arch.flops_per_token(o.seq_length) / 1e12, 4),
            "first_loss": round(measured.losses[name][0], 5),
            "final_loss": round(measured.losses[name][-1], 5),
        }
        rows.append((name, f"{rate:.0f}", f"{statistics.median(seconds) * 1e3:.1f}", f"{ratio:.3f}"))
    say(table(rows, ("step of", "tok/s", "ms", "ours is x times as fast")))
    shape = {key: value for key, value in vars(o).items() if key not in ("out", "peers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    shape["threads"] = torch.get_num_threads()
    return {"device": device, "torch": torch.__version__, "shape": shape, "providers": providers}


def _profile(step: Step, arch: Architecture, o: StepBench, steps: int = 3) -> dict[str, float]:
    """Operation -> its share of the time of `steps` steps, its callees' not included; largest first."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    tokens = torch.randint(arch.vocab_size, (o.batch, o.seq_length + 1), device=ranks.device())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step(tokens)
        _synchronize()
    name = "self_device_time_total" if gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in trace.key_averages()}
    total = sum(times.values())
    shares = {key: value / total for key, value in times.items() if value >= 0.005 * total}
    shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
    shares["everything else"] = 1.0 - sum(shares.values())
    say(table([(key, f"{share:.1%}") for key, share in shares.items()], ("our step", "of its time")))
    return {key: round(share, 4) for key, share in shares.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_SEED = 1
_OPTIMIZER = OptimizerConfig(lr=1e-3)


_PYTORCH = KernelConfig(
    rms_norm="reference", rotary="reference", swiglu="reference", attention="sdpa", token_loss="reference"
)
"""Every kernel switched to what PyTorch and megatron-core have."""


def _ours(arch: Architecture, o: StepBench, kernels: KernelConfig | None = None) -> Step:
    parallel = ParallelConfig()
    kernels = kernels or KernelConfig()
    chunks = build_model(arch, parallel, o.precision, kernels, max_sequence_length=o.seq_length)
    identity = LayerMap.parse("identity", arch.num_layers)
    load_weights(chunks, RandomWeights(arch, _SEED), arch, identity, parallel)
    return _megatron_step(chunks, o, wrap(chunks, parallel), tuned=True)


def _stock_megatron(arch: Architecture, o: StepBench) -> Step:
    """megatron-core as it comes: its local layer spec and its optimizer's defaults."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from solar_mega.model.builder import transformer_config

    parallel = ParallelConfig()
    config = transformer_config(arch, parallel, o.precision, "none")
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    chunk = GPTModel(
        config,
        spec,
        vocab_size=arch.vocab_size,
        max_sequence_length=o.seq_length,
        position_embedding_type="rope",
        rotary_base=int(arch.rope.theta),
    ).to(ranks.device())
    identity = LayerMap.parse("identity", arch.num_layers)
    load_weights([chunk], RandomWeights(arch, _SEED), arch, identity, parallel)
    return _megatron_step([chunk], o, wrap([chunk], parallel, lean=False), tuned=False)


def _megatron_step(chunks, o: StepBench, wrapped, tuned: bool) -> Step:
    optimizer = build_optimizer(wrapped, _OPTIMIZER, ParallelConfig(), o.precision, fused=tuned)
    schedule = build_schedule(optimizer, ScheduleConfig(kind="constant"), _OPTIMIZER, 10_000)
    s = o.seq_length
    mask = None
    if not tuned:
        mask = torch.ones(1, 1, s, s, dtype=torch.bool, device=ranks.device()).triu_(1)

    def loss(chunk, batch):
        return chunk(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

    trainer = Trainer(wrapped, optimizer, schedule, NEXT_TOKEN if tuned else Objective(loss), o.batch, s)
    positions = torch.arange(s, device=ranks.device())[None].expand(o.batch, -1)
    counted = torch.ones(o.batch, s, device=ranks.device())

    def step(tokens: torch.Tensor) -> float:
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "position_ids": positions,
            "loss_mask": counted,
        }
        return trainer.step(iter([batch]), 1).loss

    return step


def _transformers(arch: Architecture, o: StepBench) -> Step:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = {key: value for key, value in arch.hf_config.items() if key != "architectures"}
    config = LlamaConfig(**config, rms_norm_eps=arch.norm_eps, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(ranks.device())
    weights = RandomWeights(arch, _SEED)
    model.load_state_dict(
        {name: weights.read_rows(name, 0, shape[0]) for name, shape in hf_shapes(arch).items()}
    )
    model.train()
    c = _OPTIMIZER
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=c.lr,
        betas=(c.beta1, c.beta2),
        eps=c.eps,
        fused=True,
    )
    mixed = torch.autocast(ranks.device().type, DTYPES[o.precision], enabled=o.precision == "bf16")

    def step(tokens: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_grad)
        optimizer.step()
        return loss.item()

    return step


_BUILDERS: dict[str, Callable[[Architecture, StepBench], Step]] = {
    "solar_mega": _ours,
    "transformers": _transformers,
    "megatron": _stock_megatron,
    "reference": lambda arch, o: _ours(arch, o, _PYTORCH),
}
