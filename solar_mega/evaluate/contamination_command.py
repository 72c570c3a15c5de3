"""`solar-mega contamination`: the test of contamination.py over benchmark files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import say, table
from solar_mega.runtime.files import atomic_file

if TYPE_CHECKING:
    from solar_mega.evaluate.contamination import DatasetResult, TestPlan, Text


@dataclass(frozen=True)
class ContaminationOptions:
    """Test whether a model was trained on benchmark texts: the share of texts that it finds likelier than
    nearly all their neighbours, which a reference model writes. About 0.1 by chance, near 1 when learned."""

    model: Positional[Path | None] = None
    """The model in question: Hugging Face directory, Megatron checkpoint or run's directory."""

    config: Path | None = None
    """TOML file with any of these settings; the command line wins."""

    reference: Path | None = None
    """A model that is known not to have seen the texts, such as the base model; it writes the neighbours."""

    data: Path | None = None
    """Directory of task files, as for evaluate."""

    tasks: tuple[str, ...] = ()
    """Tasks of H6; default: those that --data has."""

    text: tuple[Path, ...] = ()
    """Instead of tasks, or besides: .jsonl or .parquet files with a text per record."""

    key: str = "text"
    """JSON key or parquet column of --text."""

    limit: int = 100
    """Texts per data set."""

    neighbours: int = 20
    """Neighbours per text."""

    rewritten: float = 0.4
    """Share of a text, its end, that a neighbour replaces."""

    threshold: float = 0.1
    """A text counts as known when a smaller share of its neighbours is likelier."""

    min_k: float = 0.2
    """Share of the least likely tokens in Min-K% Prob."""

    temperature: float = 1.0
    """Of the reference's sampling."""

    max_tokens: int = 256
    """Longer texts are cut."""

    seed: int = 0

    tp: int = 1
    """Tensor-parallel ranks that share a model."""

    pp: int = 1
    """Pipeline stages that share a model."""

    out: Path | None = None
    """Write the result as JSON to this file."""


def contamination(argv: Sequence[str]) -> int:
    options = parse_options(ContaminationOptions, argv, "contamination")
    run(options)
    return 0


def run(o: ContaminationOptions) -> "list[DatasetResult]":
    """Every rank calls this; the results are on rank 0. Raises UserError."""
    from solar_mega.evaluate.contamination import TestPlan
    from solar_mega.evaluate.model import prepare
    from solar_mega.runtime import parallel as ranks

    _check(o)
    parallel = ParallelConfig(tp=o.tp, pp=o.pp)
    assert o.model is not None and o.reference is not None
    ranks.check_world_size(parallel, ranks.world_size())
    for path, key in ((o.model, "MODEL"), (o.reference, "--reference")):
        prepare(path, parallel, key)
    texts = _texts(o)
    plan = TestPlan(o.neighbours, o.rewritten, o.threshold, o.min_k, o.temperature, o.max_tokens, o.seed)
    with ranks.running(parallel):
        results = _test(o, parallel, texts, plan)
    if results:
        say("\n" + describe(results, o))
        if o.out is not None:
            content = {"settings": json.loads(json.dumps(vars(o), default=str))}
            content["results"] = [asdict(result) for result in results]
            with atomic_file(o.out) as stream:
                json.dump(content, stream, indent=1)
            say(str(o.out))
    return results


def _test(
    o: ContaminationOptions, parallel: ParallelConfig, texts: dict[str, list[str]], plan: "TestPlan"
) -> "list[DatasetResult]":
    """One model in memory at a time: the reference writes, then the target reads."""
    from solar_mega.evaluate import contamination as test
    from solar_mega.evaluate.model import opened

    target_tokenizer, reference_tokenizer = _tokenizer(o.model), _tokenizer(o.reference)
    prepared: dict[str, tuple[list[Text], int]] = {
        name: test.prepare_texts(name, found, target_tokenizer, plan) for name, found in texts.items()
    }
    every = [text for found, _ in prepared.values() for text in found]
    reference_k: list[float] = []
    with opened(o.reference, parallel) as model:
        if model.leads:
            _fits(model, plan, "--reference")
            test.write_neighbours(model, every, target_tokenizer, reference_tokenizer, plan)
            theirs = [
                reference_tokenizer.encode(target_tokenizer.decode(t.tokens), add_special_tokens=False)
                for t in every
            ]
            reference_k = test.min_k_probs(model, theirs, reference_tokenizer, plan.min_k)
    with opened(o.model, parallel) as model:
        if not model.leads:
            return []
        _fits(model, plan, "MODEL")
        shares = test.likelier_shares(model, every, target_tokenizer)
        target_k = test.min_k_probs(model, [t.tokens for t in every], target_tokenizer, plan.min_k)
    results, at = [], 0
    for name, (found, too_short) in prepared.items():
        part = slice(at, at + len(found))
        at += len(found)
        numbers = (shares[part], target_k[part], reference_k[part])
        results.append(test.summarise(name, *numbers, too_short, plan.threshold))
    return results


def _fits(model: Any, plan: "TestPlan", key: str) -> None:
    if 2 * plan.max_tokens > model.max_length:
        raise UserError(
            f"--max-tokens {plan.max_tokens}: {key} has a context of {model.max_length}; allowed: up to "
            f"{model.max_length // 2}"
        )


def _tokenizer(path: Path | None) -> Any:
    from transformers import AutoTokenizer

    from solar_mega.checkpoint.source import open_source
    from solar_mega.data.tokenizer import load_tokenizer

    assert path is not None
    load_tokenizer(open_source(path).side_files)  # says what is missing
    return AutoTokenizer.from_pretrained(str(open_source(path).side_files), local_files_only=True)


def _check(o: ContaminationOptions) -> None:
    problems = Problems()
    if o.model is None:
        problems.add("no model given")
    if o.reference is None:
        problems.add("--reference is missing: a model that has not seen the texts, such as the base model")
    if o.data is None and not o.text:
        problems.add("nothing to test: give --data (task files), --text, or both")
    if o.tasks and o.data is None:
        problems.add("--tasks needs --data, the directory with their files")
    for name in ("limit", "neighbours", "max_tokens", "tp", "pp"):
        if getattr(o, name) < 1:
            problems.add(f"--{name.replace('_', '-')} {getattr(o, name)}: must be 1 or more")
    for name in ("rewritten", "threshold", "min_k"):
        if not 0 < getattr(o, name) < 1:
            problems.add(f"--{name.replace('_', '-')} {getattr(o, name)}: must be between 0 and 1")
    if o.temperature <= 0:
        problems.add(f"--temperature {o.temperature}: must be above 0, or all neighbours would be the same")
    problems.raise_if_any("contamination")


def _texts(o: ContaminationOptions) -> dict[str, list[str]]:
    """Data set -> texts. Raises UserError for missing files and bad records."""
    from solar_mega.evaluate.contamination import read_texts
    from solar_mega.evaluate.task_files import find_task_files, has_files, records
    from solar_mega.evaluate.tasks import plan_tasks

    texts: dict[str, list[str]] = {}
    if o.data is not None:
        plans = plan_tasks(o.tasks, "lm-eval")
        if not o.tasks and o.data.is_dir():
            plans = [plan for plan in plans if has_files(o.data, plan)] or plans
        files = find_task_files(o.data, plans)
        for plan in plans:
            found = [files[unit] for unit in plan.units if unit in files]
            paths = [unit.splits[unit.test_split] for unit in found]
            texts[plan.title] = read_texts(plan.name, paths, o.limit)
    problems = Problems()
    for path in o.text:
        if not path.is_file():
            problems.add(f"--text {path}: no such file")
            continue
        found = []
        for place, record in records(path):
            value = record.get(o.key) if isinstance(record, dict) else None
            if not isinstance(value, str):
                problems.add(f"--text {path}:{place}: no text under {o.key!r}; name the field with --key")
                break
            found.append(value)
        texts[path.stem] = found[: o.limit]
    problems.raise_if_any("contamination")
    return texts


def describe(results: "Sequence[DatasetResult]", o: ContaminationOptions) -> str:
    percent = f"Min-{100 * o.min_k:.0f}%"
    rows = [
        (
            r.dataset,
            r.texts,
            f"{r.share:.2f}",
            f"{r.mean_r:.2f}",
            f"{r.min_k_target:.3f}",
            f"{r.min_k_reference:.3f}",
        )
        for r in results
    ]
    headers = ("data set", "texts", f"share r < {o.threshold}", "mean r", percent, f"{percent} of reference")
    short = sum(r.too_short for r in results)
    note = f"\n{short} texts were too short" if short else ""
    return table(rows, headers) + note
