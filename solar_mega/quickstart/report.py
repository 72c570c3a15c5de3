"""What the quickstart shows at its end: report.json, the table, the picture, logits against transformers,
text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.quickstart.runs import Curve, Runs, read_runs
from solar_mega.runtime.console import human_count, human_seconds, say, table
from solar_mega.runtime.files import atomic_file

_PROMPTS = ("def ", "import os\n\n", "class Node:\n")


@dataclass(frozen=True)
class Comparison:
    """The trained model as Megatron holds it, beside its Hugging Face export in transformers."""

    logits_max_abs_diff: float
    parameters: int
    samples: tuple[str, ...]


def write_report(root: Path, seconds: float) -> dict[str, Any]:
    """Reads the finished runs under `root`, writes report.json and loss.png there, prints the summary.

    Args:
        seconds: compute time of all stages so far.
    """
    from solar_mega.checkpoint.source import open_source
    from solar_mega.model.architecture import Architecture
    from solar_mega.quickstart.plot import plot

    runs = read_runs(root)
    base = Architecture.from_hf(open_source(root / "base" / "hf").config)
    comparison = compare_with_transformers(root / "grown")
    report = {
        "base_val_loss": runs.base.end,
        "grown_val_loss_step0": runs.grown.start,
        "grown_val_loss_final": runs.grown.end,
        "stack_val_loss_step0": runs.stack.start,
        "stack_val_loss_final": runs.stack.end,
        "scratch_val_loss_final": runs.scratch.end,
        "base_continued_val_loss_final": runs.continued.end,
        "tokens_base": runs.base.tokens[-1],
        "tokens_continued": runs.grown.tokens[-1],
        "tokens_to_recover_base": runs.grown.tokens_to_reach(runs.base.end),
        "stack_tokens_to_recover_base": runs.stack.tokens_to_reach(runs.base.end),
        **{
            f"flops_{name}": getattr(runs, name).flops[-1]
            for name in ("base", "grown", "stack", "continued", "scratch")
        },
        "logits_max_abs_diff": comparison.logits_max_abs_diff,
        "parameters_base": base.parameters(),
        "parameters_grown": comparison.parameters,
        "seconds": round(seconds, 1),
        "tokens_per_second": runs.base.tokens_per_second,
    }
    with atomic_file(root / "report.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    plot(runs, root / "loss.png")
    say(_summary(runs, report, comparison, root))
    return report


def compare_with_transformers(run: Path) -> Comparison:
    """Logits of the run's Megatron checkpoint (saved by two pipeline stages, loaded here by one process)
    against transformers on its export, on the same text; then a few lines from transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from solar_mega.checkpoint.megatron import load_checkpoint
    from solar_mega.checkpoint.source import open_source
    from solar_mega.checkpoint.store import CheckpointStore
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.model.architecture import Architecture
    from solar_mega.model.builder import build_model
    from solar_mega.runtime import parallel as ranks

    export = run / "hf"
    tokenizer = AutoTokenizer.from_pretrained(export)
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    arch = Architecture.from_hf(open_source(export).config)
    text = Path(json.__file__).read_text()[:4000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([ids[: min(256, arch.max_position_embeddings)]])
    with ranks.running(ParallelConfig()), torch.no_grad():
        (ours,) = build_model(arch, ParallelConfig(), "fp32")
        load_checkpoint(CheckpointStore(run / "checkpoints").latest(), [ours], None, None)
        positions = torch.arange(tokens.shape[1])[None]
        logits = ours.eval()(tokens, positions, None)
        difference = (logits - theirs(tokens).logits).abs().max().item()
    torch.manual_seed(0)
    samples = []
    for prompt in _PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        samples.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return Comparison(difference, arch.parameters(), tuple(samples))


def _summary(runs: Runs, report: dict[str, Any], comparison: Comparison, root: Path) -> str:
    def row(name: str, curve: Curve, start: float | None = None) -> tuple[str, ...]:
        reached = curve.tokens_to_reach(runs.base.end)
        begin = curve.start if start is None else start
        again = "-" if reached is None else human_count(reached) if reached else "at once"
        return name, f"{begin:.3f}", f"{curve.end:.3f}", again, f"{curve.flops[-1] / 1e12:.1f}"

    rows = [
        row("12 layers, dus:2 (the paper)", runs.grown),
        row("16 layers, stack:2 (doubling)", runs.stack),
        row("8 layers, base trained on", runs.continued),
        row("12 layers from scratch", runs.scratch),
    ]
    headers = ("after growth", "loss at step 0", "final loss", "tokens to base level", "TFLOP")
    samples = "\n".join("    " + line for text in comparison.samples for line in [*text.splitlines()[:5], ""])
    return "\n".join(
        (
            "",
            f"The base: {human_count(report['parameters_base'])} parameters, "
            f"{human_count(report['tokens_base'])} tokens, validation loss {runs.base.end:.3f}. "
            f"Then {human_count(report['tokens_continued'])} tokens each:",
            "",
            table(rows, headers),
            "",
            f"The grown model ({human_count(report['parameters_grown'])} parameters) in transformers: logits "
            f"differ by at most {report['logits_max_abs_diff']:.1e}. It writes:",
            "",
            samples,
            f"{root}/loss.png, report.json, and the model itself in {root}/grown/hf   "
            f"({human_seconds(report['seconds'])})",
        )
    )
