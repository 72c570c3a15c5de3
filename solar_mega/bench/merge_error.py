"""`solar-mega bench merge-error`: how far merged weights are from the formula, ours and mergekit's.

Two or three generated models are merged by the same mergekit recipe, and every element is compared with the
formula in fp64 on the weights as stored. Distances are in bf16 ulps of the exact value: the best that a bf16
result can do is 1/4 in the mean and 1/2 at most. Near-cancellations are measured in ulps of the largest
term, as what is left of two rounded terms has no more digits than they have.
"""

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solar_mega.artifact.hf import HFDirectory, write_config
from solar_mega.artifact.lineage import package_versions
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.errors import UserError
from solar_mega.merge.arithmetic import LERP_ABOVE
from solar_mega.merge.mergekit import read_mergekit
from solar_mega.merge.plan import plan_merge
from solar_mega.merge.run import merge
from solar_mega.model.architecture import Architecture
from solar_mega.runtime.console import say, table
from solar_mega.runtime.files import require_empty

Formula = Callable[[Sequence[Tensor]], Tensor]

_STORED = {"bf16": "BF16", "fp32": "F32"}
_RECIPE_DTYPES = {"bfloat16": "dtype: bfloat16", "float32": "dtype: float32\nout_dtype: bfloat16"}
_SPREAD, _T, _WEIGHTS = 0.02, 0.3, (0.3, 0.7)
_TINY = 2.0**-126


@dataclass(frozen=True)
class MergeErrorBench:
    """Merge generated models as mergekit's recipes say, and compare with fp64."""

    work: Path
    """Directory for the models and results; must not exist, or be empty. Removed at the end."""

    hidden: int = 512
    """Width of the models: 12.6M weights at 512, in 4 layers."""

    mergekit: str | None = None
    """mergekit's executable (`mergekit-yaml`); default: the one on PATH. Without one, only ours."""

    cases: tuple[str, ...] = ("average", "average3", "weighted", "slerp")
    """average: weights 0.5 and 0.5; average3: of three, weights 1; weighted: 0.3 and 0.7; slerp: t = 0.3."""

    stored: tuple[str, ...] = ("bf16", "fp32")
    """Precisions in which the models are stored."""

    out: Path | None = None
    """Write the result as JSON to this file."""


def run(options: MergeErrorBench) -> None:
    """Prints a table, writes the JSON."""
    require_empty(options.work, "--work")
    peer = options.mergekit or shutil.which("mergekit-yaml")
    if peer is not None and shutil.which(peer) is None:
        raise UserError(f"--mergekit {peer}: no such executable")
    unknown = [*set(options.cases) - CASES.keys(), *set(options.stored) - _STORED.keys()]
    if unknown:
        allowed = f"--cases {' '.join(CASES)}, --stored {' '.join(_STORED)}"
        raise UserError(f"bench merge-error: unknown {', '.join(unknown)}; allowed: {allowed}")
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        results = list(measure(options, peer))
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    columns = ("case", "stored", "dtype", "contestant", "mean ulp", "max ulp")
    rows = [
        (r["case"], r["stored"], r["dtype"], r["contestant"], f"{r['mean_ulp']:.6f}", f"{r['max_ulp']:.4f}")
        for r in results
    ]
    say(table(rows, columns))
    if options.out is not None:
        report = {
            "what": "distance of merged bf16 weights from the fp64 formula, in bf16 ulps of the exact value",
            "hidden": options.hidden,
            "versions": package_versions(),
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def measure(options: MergeErrorBench, peer: str | None) -> Iterator[dict[str, Any]]:
    """{case, stored, dtype, contestant, elements, mean_ulp, max_ulp} of every merge."""
    for stored in options.stored:
        models = [_model(options, stored, seed) for seed in range(3)]
        for case in options.cases:
            given = models[: CASES[case].models]
            for dtype, lines in _RECIPE_DTYPES.items():
                recipe = options.work / "recipe.yml"
                recipe.write_text(f"{CASES[case].recipe(given)}\n{lines}\n", "utf-8")
                for name, work in (("solar_mega", _ours), ("mergekit", _theirs)):
                    if name == "mergekit" and peer is None:
                        continue
                    out = options.work / "out"
                    work(recipe, out, peer)
                    found = _distances(out, given, CASES[case].formula)
                    shutil.rmtree(out)
                    yield {"case": case, "stored": stored, "dtype": dtype, "contestant": name, **found}


def _ours(recipe: Path, out: Path, _: str | None) -> None:
    merge(plan_merge(read_mergekit(recipe)), out)


def _theirs(recipe: Path, out: Path, peer: str | None) -> None:
    done = subprocess.run([str(peer), str(recipe), str(out), "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"mergekit failed ({done.returncode}):\n{done.stderr[-2000:]}")


def _model(options: MergeErrorBench, stored: str, seed: int) -> Path:
    """A model whose weights share a part with those of other seeds: about 37 degrees apart."""
    place = options.work / f"{stored}-{seed}"
    place.mkdir()
    hidden = options.hidden
    arch = Architecture.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 4,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2048,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16" if stored == "bf16" else "float32",
        }
    )
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    with ShardedWriter(place) as writer:
        writer.plan([(name, _STORED[stored], shape) for name, shape in hf_shapes(arch).items()])
        for name, shape in hf_shapes(arch).items():
            weight = 2 * torch.randn(shape, generator=common) + torch.randn(shape, generator=own)
            weight *= _SPREAD / math.sqrt(5)
            writer.write(name, weight.bfloat16() if stored == "bf16" else weight)
    write_config(place, dict(arch.hf_config))
    return place


def _distances(out: Path, models: Sequence[Path], formula: Formula) -> dict[str, float]:
    merged, inputs = HFDirectory(out).tensors, [HFDirectory(model).tensors for model in models]
    total = largest = 0.0
    elements = 0
    for name in merged.infos:
        terms = [reader.read(name).double() for reader in inputs]
        exact, found = formula(terms), merged.read(name)
        if found.dtype != torch.bfloat16:
            raise UserError(f"{out}: {name} is {found.dtype}, the recipe asks for bfloat16")
        away = (found.double() - exact).abs() / _ulp(exact, terms)
        total += away.sum().item()
        largest = max(largest, away.max().item())
        elements += away.numel()
    return {"elements": elements, "mean_ulp": total / elements, "max_ulp": largest}


def _ulp(exact: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Distance between neighbours of bf16 (8 significant bits) at |exact|; where terms cancel to less than
    2^-8 of the largest, at that."""
    floor = torch.stack([term.abs() for term in terms]).amax(0) * 2.0**-8
    magnitude = torch.maximum(exact.abs(), floor).clamp_min(_TINY)
    return torch.exp2(torch.floor(torch.log2(magnitude)) - 7)


def _slerp(pair: Sequence[Tensor]) -> Tensor:
    a, b = pair
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > LERP_ABOVE:
        return (1 - _T) * a + _T * b
    theta = math.acos(cosine)
    return (math.sin((1 - _T) * theta) * a + math.sin(_T * theta) * b) / math.sin(theta)


@dataclass(frozen=True)
class _Case:
    models: int
    formula: Formula
    weights: tuple[float, ...] = ()
    """Empty: SLERP."""

    def recipe(self, models: Sequence[Path]) -> str:
        if not self.weights:
            lines = [f"  - model: {model}" for model in models]
            return "\n".join(
                [
                    "merge_method: slerp",
                    "models:",
                    *lines,
                    f"base_model: {models[0]}",
                    f"parameters: {{t: {_T}}}",
                ]
            )
        lines = [
            f"  - model: {model}\n    parameters: {{weight: {weight}}}"
            for model, weight in zip(models, self.weights, strict=True)
        ]
        return "\n".join(["merge_method: linear", "models:", *lines])


CASES: Mapping[str, _Case] = {
    "average": _Case(2, lambda x: (x[0] + x[1]) / 2, (0.5, 0.5)),
    "average3": _Case(3, lambda x: (x[0] + x[1] + x[2]) / 3, (1.0, 1.0, 1.0)),
    "weighted": _Case(2, lambda x: _WEIGHTS[0] * x[0] + _WEIGHTS[1] * x[1], _WEIGHTS),
    "slerp": _Case(2, _slerp),
}
