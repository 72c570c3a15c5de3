"""`solar-mega synthesize`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.data.generators import (
    EndpointGenerator,
    Generator,
    ReplayGenerator,
    Sampling,
)
from solar_mega.data.local_generators import TransformersGenerator, VllmGenerator
from solar_mega.data.math_answers import require_library
from solar_mega.data.rows import DatasetSpec
from solar_mega.data.synthesize import ALIGNMENT, INSTRUCT, KINDS, Kind, Report
from solar_mega.data.synthesize import synthesize as make
from solar_mega.errors import Problems
from solar_mega.runtime.console import human_count, say


@dataclass(frozen=True)
class SynthesizeOptions:
    """New mathematics from MATH's problems (paper, section 3.2): instruct.jsonl for instruction
    tuning and alignment.jsonl for DPO. Interrupted work goes on where it was."""

    seeds: Positional[str]
    """MATH: a file or directory of {problem, solution} (jsonl, json, parquet, a dataset directory)."""

    output: Path
    """Directory."""

    backend: Literal["openai", "transformers", "vllm", "replay"]
    """An OpenAI-compatible endpoint, a local transformers model, vLLM, or recorded answers."""

    model: str = ""
    """The endpoint's name of the model, or a model directory."""

    base_url: str = "https://api.openai.com/v1"
    """Of the endpoint; `/chat/completions` is added."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; unset: no key is sent."""

    replay: Path | None = None
    """Recorded answers: JSON lines of {prompt, text, sample}."""

    kinds: tuple[Literal["rephrased", "answer_augmentation", "fobar", "self_verification"], ...] = (
        "rephrased",
    )
    """Ways to new questions; the paper's sets are of `rephrased` ones."""

    samples: int = 1
    """New questions of each kind per seed."""

    limit: int | None = None
    """Only the first so many seeds."""

    temperature: float = 0.7
    max_tokens: int = 1024
    """Of one answer; longer ones are left out."""

    seed: int = 1234
    concurrency: int = 8
    """Requests under way at the endpoint; batch size of transformers."""

    tensor_parallel: int = 1
    """GPUs that hold the model together, of vLLM."""

    requests_per_minute: float | None = None
    """Of the endpoint; default: no limit of ours."""

    retries: int = 5
    """Of a request that the endpoint refuses for the moment or does not answer, with growing pauses."""

    timeout: float = 120.0
    """Seconds to wait for an answer."""

    price_in: float = 0.0
    """Per million tokens the model reads, for the report of costs."""

    price_out: float = 0.0
    """Per million tokens the model writes."""


def synthesize(argv: Sequence[str]) -> None:
    options = parse_options(SynthesizeOptions, argv, "synthesize")
    _check(options)
    require_library()
    spec = DatasetSpec("math", options.seeds, rows=(0, options.limit))
    kinds: tuple[Kind, ...] = options.kinds
    report = make(spec, _generator(options), options.output, kinds, options.samples, options.seed)
    say(describe(report, options))


def _check(o: SynthesizeOptions) -> None:
    problems = Problems()
    if o.backend == "replay" and o.replay is None:
        problems.add("--backend replay needs --replay FILE")
    if o.backend != "replay" and not o.model:
        problems.add(f"--backend {o.backend} needs --model")
    if o.output.exists() and not o.output.is_dir():
        problems.add(f"--output {o.output}: is a file; name a directory")
    if not o.kinds or len(set(o.kinds)) < len(o.kinds):
        problems.add(f"--kinds {' '.join(o.kinds)}: name one or more of {', '.join(KINDS)}, each once")
    at_least = {
        "samples": 1,
        "max_tokens": 1,
        "concurrency": 1,
        "retries": 0,
        "limit": 1,
        "tensor_parallel": 1,
    }
    for name, least in at_least.items():
        value = getattr(o, name)
        if value is not None and value < least:
            problems.add(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("temperature", "price_in", "price_out"):
        if getattr(o, name) < 0:
            problems.add(f"--{name.replace('_', '-')} {getattr(o, name)}: must be at least 0")
    for name in ("timeout", "requests_per_minute"):
        value = getattr(o, name)
        if value is not None and value <= 0:
            problems.add(f"--{name.replace('_', '-')} {value}: must be above 0")
    problems.raise_if_any("synthesize")


def _generator(o: SynthesizeOptions) -> Generator:
    sampling = Sampling(o.temperature, o.max_tokens, o.seed)
    if o.backend == "replay":
        assert o.replay is not None
        return ReplayGenerator(o.replay)
    if o.backend == "transformers":
        return TransformersGenerator(Path(o.model), sampling, o.concurrency)
    if o.backend == "vllm":
        return VllmGenerator(Path(o.model), sampling, o.tensor_parallel)
    return EndpointGenerator(
        o.base_url,
        o.model,
        os.environ.get(o.api_key_env),
        sampling,
        concurrency=o.concurrency,
        requests_per_minute=o.requests_per_minute,
        retries=o.retries,
        timeout=o.timeout,
    )


def describe(report: Report, options: SynthesizeOptions) -> str:
    """The report as a few lines for the console."""
    kept = ", ".join(f"{count:,} {kind}" for kind, count in report.kept.items()) or "nothing"
    lines = [
        f"{report.seeds:,} seeds: {kept} kept",
        f"  {report.requests:,} requests, {report.cached:,} of them answered before; "
        f"{human_count(report.prompt_tokens)} tokens in, {human_count(report.completion_tokens)} out"
        + (f", cost {report.cost(options.price_in, options.price_out):.2f}" if options.price_out else ""),
        *(f"  {count:,} dropped: {reason}" for reason, count in report.dropped.most_common()),
        f"  {options.output / INSTRUCT}",
        f"  {options.output / ALIGNMENT}",
    ]
    return "\n".join(lines)
