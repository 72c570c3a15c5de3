"""`solar-mega bench dpo-step`: peak memory and time of a whole DPO step, beside TRL's with its second model.

Same architecture, weights, tokens, optimizer (AdamW) and micro-batch on both sides, no recomputation on
either. Ours holds one model and takes the reference's log-probs from the cache (whose forward-only pass is
made in the same process first, and counts); TRL's DPOTrainer holds policy and reference. Each side runs in a
process of its own, in turns, and reports the most memory it held above what it held before the model was
built.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from solar_mega.config.command_line import parse_options
from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes, say, table

SIDES = ("solar_mega", "trl")


@dataclass(frozen=True)
class DPOStepBench:
    """Peak memory and time of a DPO step: ours with cached reference log-probs, TRL's with two models."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    vocab: int = 32000
    length: int = 256
    """Tokens of a prompt and one response; a quarter of them are the prompt."""
    pairs: int = 4
    """Pairs of a step, in one micro-batch on both sides."""
    steps: int = 3
    precision: Literal["fp32", "bf16"] = "fp32"
    rounds: int = 2
    """Runs of each side, in turns."""
    threads: int = 1
    out: Path | None = None
    """Write the result as JSON to this file."""
    side: Literal["", "solar_mega", "trl"] = ""
    """One side in this process, its result on stdout; set by the benchmark itself."""


def run(options: DPOStepBench) -> dict[str, Any]:
    """Measure, print a table, return (and write) the report."""
    if options.side:
        print(json.dumps(_SIDES[options.side](options)))
        return {}
    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            seen[side].append(_in_process(options, side))
    report = _report(options, seen)
    _print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _in_process(options: DPOStepBench, side: str) -> dict[str, Any]:
    given = {name: value for name, value in asdict(options).items() if name not in ("out", "rounds")}
    words = [f"--{name}={value}" for name, value in {**given, "side": side}.items()]
    call = [sys.executable, "-m", "solar_mega", "bench", "dpo-step", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"bench dpo-step: {side} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(options: DPOStepBench, seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    import torch

    from solar_mega.bench import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {k: v for k, v in asdict(options).items() if k not in ("out", "side")}
    sides = {
        side: {
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "step_seconds": statistics.median(run["step_seconds"] for run in runs),
            "losses": runs[0]["losses"],
            "runs": runs,
        }
        for side, runs in seen.items()
    }
    ratios = [mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in zip(*seen.values(), strict=True)]
    report = measure.surroundings(device) | {"bench": "dpo-step", "shape": shape, "sides": sides}
    return report | {"peak_of_ours_to_theirs": statistics.median(ratios)}


def _print(report: dict[str, Any]) -> None:
    rows = [
        (
            name,
            human_bytes(side["peak_bytes"]),
            f"{side['step_seconds']:.2f}",
            " ".join(f"{loss:.6f}" for loss in side["losses"]),
        )
        for name, side in report["sides"].items()
    ]
    say(table(rows, ("DPO step", "peak", "seconds", "losses")))
    say(f"peak of ours: {report['peak_of_ours_to_theirs']:.2f} of TRL's")


# ---------------------------------------------------------------------------------------------- one side


class _Peak:
    """The most memory held since `begin`, above what was held then."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.cuda else _resident()
        if not self.cuda:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports

    def bytes(self) -> int:
        import torch

        return (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.before


def _resident(key: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def _hf_config(o: DPOStepBench) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": o.layers,
        "hidden_size": o.hidden,
        "intermediate_size": o.hidden * 7 // 2,
        "num_attention_heads": o.heads,
        "num_key_value_heads": o.heads,
        "vocab_size": o.vocab,
        "max_position_embeddings": 2 * o.pairs * o.length,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }


def _pairs(o: DPOStepBench):
    from solar_mega.data.preference_tokens import Response, TokenPair

    draw = np.random.default_rng(0)
    prompt = max(1, o.length // 4)

    def response(start: np.ndarray) -> Response:
        ids = np.concatenate([start, draw.integers(1, o.vocab, o.length - prompt)]).astype(np.int32)
        return Response(ids, np.arange(o.length) >= prompt)

    pairs = []
    for _ in range(o.pairs * o.steps):
        start = draw.integers(1, o.vocab, prompt)
        pairs.append(TokenPair(response(start), response(start)))
    return pairs


def _weights(o: DPOStepBench):
    """Both sides' weights: drawn by name."""
    from solar_mega.checkpoint.random_weights import RandomWeights
    from solar_mega.model.architecture import Architecture

    arch = Architecture.from_hf(_hf_config(o))
    return arch, RandomWeights(arch, seed=1)


def _ours(o: DPOStepBench) -> dict[str, Any]:
    from solar_mega.align.objective import dpo_objective
    from solar_mega.align.pair_batches import Loader, RowPlan
    from solar_mega.align.reference import compute
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.config.dpo import LossConfig
    from solar_mega.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig
    from solar_mega.depth.layer_map import LayerMap
    from solar_mega.model.builder import build_model
    from solar_mega.runtime import parallel as ranks
    from solar_mega.train.optimizer import build_optimizer, build_schedule, wrap
    from solar_mega.train.step import Trainer

    pairs, parallel = _pairs(o), ParallelConfig()
    row = 2 * o.pairs * o.length
    with ranks.running(parallel, threads=o.threads):
        peak = _Peak()
        arch, weights = _weights(o)
        chunks = build_model(arch, parallel, o.precision, max_sequence_length=row)
        load_weights(chunks, weights, arch, LayerMap.parse("identity", o.layers), parallel)
        plan = RowPlan(row, packing=True, dp=1, dp_rank=0)
        reference = compute(chunks, pairs, range(len(pairs)), plan)
        wrapped, optimizer_config = wrap(chunks, parallel), OptimizerConfig(lr=1e-4, weight_decay=0.0)
        optimizer = build_optimizer(wrapped, optimizer_config, parallel, o.precision)
        schedule = build_schedule(optimizer, ScheduleConfig(kind="constant"), optimizer_config, o.steps)
        trainer = Trainer(wrapped, optimizer, schedule, dpo_objective(LossConfig()), 1, row)
        loader, losses, seconds = Loader(pairs, reference, plan), [], []
        for step in range(o.steps):
            numbers = range(step * o.pairs, (step + 1) * o.pairs)
            began = time.perf_counter()
            losses.append(trainer.step(loader.batches(numbers), loader.count(numbers)).loss)
            seconds.append(time.perf_counter() - began)
        return {"peak_bytes": peak.bytes(), "losses": losses, "step_seconds": statistics.median(seconds)}


def _theirs(o: DPOStepBench) -> dict[str, Any]:
    try:
        import trl
    except ImportError:
        raise UserError("bench dpo-step compares with TRL: pip install 'solar-mega[parity]'") from None
    import torch

    torch.set_num_threads(o.threads)
    losses: list[float] = []
    began: list[float] = []

    class Measured(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **more):
            return dataset  # it is tokens already

        def training_step(self, *args, **more):
            began.append(time.perf_counter())
            return super().training_step(*args, **more)

        def compute_loss(self, *args, **more):
            result = super().compute_loss(*args, **more)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    with tempfile.TemporaryDirectory() as place:
        rows, tokenizer = _their_rows(o), _any_tokenizer()
        peak = _Peak()
        policy, reference = _their_models(o)
        trainer = Measured(
            model=policy,
            ref_model=reference,
            args=_their_arguments(o, place),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        began.append(time.perf_counter())
        seconds = [after - before for before, after in zip(began, began[1:], strict=False)]
        return {"peak_bytes": peak.bytes(), "losses": losses, "step_seconds": statistics.median(seconds)}


def _their_rows(o: DPOStepBench):
    from datasets import Dataset

    pairs = _pairs(o)
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.chosen.ids[~pair.chosen.loss].tolist() for pair in pairs],
            "chosen_ids": [pair.chosen.ids[pair.chosen.loss].tolist() for pair in pairs],
            "rejected_ids": [pair.rejected.ids[pair.rejected.loss].tolist() for pair in pairs],
        }
    )


def _their_models(o: DPOStepBench) -> list[Any]:
    """Policy and reference, both with the weights of `_weights`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, weights = _weights(o)
    config = LlamaConfig(**{k: v for k, v in _hf_config(o).items() if k != "architectures"})
    models = []
    for _ in range(2):
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights.read_rows(name, 0, parameter.shape[0]))
        models.append(model.to(torch.bfloat16 if o.precision == "bf16" else torch.float32))
    return models


def _their_arguments(o: DPOStepBench, place: str):
    import torch
    import trl

    return trl.DPOConfig(
        output_dir=place,
        per_device_train_batch_size=o.pairs,
        max_steps=o.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def _any_tokenizer():
    """TRL wants one to pad with; the data are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


_SIDES = {"solar_mega": _ours, "trl": _theirs}


def command(argv: Sequence[str]) -> None:
    run(parse_options(DPOStepBench, argv, "bench dpo-step"))
