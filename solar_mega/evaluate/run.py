"""One model through the tasks: resumable per task, on rank 0, the other ranks serving.

OUT/<model>/<task>.json          one per task and MMLU subject, with what it depends on; reused when equal
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from solar_mega.errors import UserError
from solar_mega.evaluate.task_files import TaskFiles, layout_of, which_files
from solar_mega.evaluate.tasks import DIRECTORIES, TaskPlan
from solar_mega.runtime.console import say
from solar_mega.runtime.files import atomic_file

FEWSHOT_SEED = 1234  # the harness's default


@dataclass(frozen=True)
class Settings:
    """What every unit runs with."""

    preset: str
    limit: int | None
    apply_chat_template: bool
    log_samples: bool


@dataclass(frozen=True)
class TaskScore:
    """One row of the table."""

    name: str
    title: str
    metric: str
    value: float
    """As a share of 1."""
    stderr: float
    questions: int
    units: int
    all_units: int
    """MMLU has 57; fewer when the local data has fewer."""
    details: dict[str, dict[str, Any]]
    """Unit -> everything the harness reports."""


def fingerprint(path: Path) -> str:
    """Of a model or data directory: names, sizes and times of its files. Reading 20 GB to hash them would
    take longer than many a task."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state = file.stat()
            digest.update(f"{file.relative_to(path)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


class Evaluation:
    """The tasks of one run, ready for any number of models."""

    def __init__(self, plans: list[TaskPlan], files: dict[str, TaskFiles] | None, settings: Settings) -> None:
        from lm_eval.tasks import TaskManager

        self.plans, self.files, self.settings = plans, files, settings
        self.manager = TaskManager(**_index(plans))
        known = set(self.manager.all_tasks)
        unknown = [unit for plan in plans for unit in plan.units if unit not in known]
        if unknown:
            raise UserError(f"--tasks {' '.join(unknown)}: unknown task{_nearest(unknown[0], known)}")

    def run(self, lm: Any, folder: Path, model_key: str) -> list[TaskScore]:
        """`lm`: any model of lm-evaluation-harness. Says every score as it is known. Raises UserError when a
        task's data cannot be had."""
        scores = []
        for plan in self.plans:
            scores += self.run_quietly([plan], lm, folder, model_key)
            say(describe(scores[-1]))
        return scores

    def run_quietly(
        self, plans: Iterable[TaskPlan], lm: Any, folder: Path, model_key: str
    ) -> list[TaskScore]:
        """Some of the tasks."""
        scores = []
        for plan in plans:
            units = [unit for unit in plan.units if self.files is None or unit in self.files]
            results = {unit: self._unit(lm, plan, unit, folder, model_key) for unit in units}
            scores.append(_combined(plan, results))
        return scores

    def _unit(self, lm: Any, plan: TaskPlan, unit: str, folder: Path, model_key: str) -> dict[str, Any]:
        config = self._config(plan, unit)
        key = {
            "model": model_key,
            "config": config,
            "settings": vars(self.settings),
            "fewshot": plan.fewshot,
            "data": self._data_key(unit),
            "lm_eval": version("lm-eval"),
        }
        key = json.loads(json.dumps(key))
        place = folder / f"{unit}.json"
        if place.is_file():
            kept = json.loads(place.read_text())
            if kept.get("key") == key:
                return kept["result"]
        result = self._evaluate(lm, plan, config)
        if self.settings.log_samples:
            samples = result.pop("samples")
            with atomic_file(folder / f"{unit}.samples.jsonl") as stream:
                stream.writelines(json.dumps(sample, default=str) + "\n" for sample in samples)
        with atomic_file(place) as stream:
            json.dump({"key": key, "result": result}, stream, indent=1)
        return result

    def _config(self, plan: TaskPlan, unit: str) -> dict[str, Any]:
        config = {"task": unit, **plan.overrides}
        if self.files is not None:
            layout = layout_of(plan.name)
            assert layout is not None
            config |= self.files[unit].overrides(layout.fewshot)
        return config

    def _data_key(self, unit: str) -> str | None:
        if self.files is None:
            return None
        return " ".join(fingerprint(path) for path in self.files[unit].splits.values())

    def _evaluate(self, lm: Any, plan: TaskPlan, config: dict[str, Any]) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        with _hub_errors(plan):
            output = simple_evaluate(
                model=lm,
                # A group's member may override its task's settings; a task by itself may not.
                tasks=[{"group": "evaluate", "task": [copy.deepcopy(config)]}],
                num_fewshot=plan.fewshot,
                task_manager=self.manager,
                limit=self.settings.limit,
                bootstrap_iters=1000,
                log_samples=self.settings.log_samples,
                apply_chat_template=self.settings.apply_chat_template,
                fewshot_random_seed=FEWSHOT_SEED,
            )
        assert output is not None
        unit = config["task"]
        if unit not in output["results"]:
            raise UserError(
                f"--tasks {unit}: a group of tasks; name them one by one: {', '.join(output['results'])}"
            )
        numbers = output["results"][unit]
        result = {
            "metrics": {name: value for name, value in numbers.items() if "," in name},
            "questions": output["n-samples"][unit]["effective"],
        }
        if self.settings.log_samples:
            result["samples"] = output["samples"][unit]
        return result


def _index(plans: Iterable[TaskPlan]) -> dict[str, Any]:
    """Arguments of the harness's TaskManager: its whole index only when a task asks for it."""
    if any(layout_of(plan.name) is None for plan in plans):
        return {}
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return {"include_defaults": False, "include_path": [str(root / folder) for folder in DIRECTORIES]}


def _nearest(name: str, known: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; `lm-eval ls tasks` lists all"


# httpx, requests, datasets and huggingface_hub each have their own.
_NO_DATA = {
    "ConnectionError",
    "ConnectError",
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
    "DatasetNotFoundError",
    "TransportError",
}


@contextmanager
def _hub_errors(plan: TaskPlan) -> Iterator[None]:
    """Data that cannot be fetched becomes an error that says which file goes where."""
    try:
        yield
    except Exception as error:
        if not {base.__name__ for base in type(error).__mro__} & _NO_DATA:
            raise
        raise UserError(
            f"{plan.title}: its data set cannot be reached on the hub ({type(error).__name__}). Without "
            f"network give --data DATA with these files:\n{which_files([plan])}"
        ) from error


def _combined(plan: TaskPlan, results: dict[str, dict[str, Any]]) -> TaskScore:
    metric = plan.metric or next(iter(next(iter(results.values()))["metrics"]))
    values, errors, sizes = [], [], []
    for unit, result in results.items():
        if metric not in result["metrics"]:
            raise UserError(f"{unit} has no {metric}; it has {', '.join(result['metrics'])}")
        name, _, filtered = metric.partition(",")
        error = result["metrics"].get(f"{name}_stderr,{filtered}")
        values.append(float(result["metrics"][metric]))
        errors.append(float(error) if isinstance(error, (int, float)) else math.nan)
        sizes.append(result["questions"])
    weights = [size / sum(sizes) for size in sizes] if plan.weighted else [1 / len(sizes)] * len(sizes)
    return TaskScore(
        name=plan.name,
        title=plan.title,
        metric=metric,
        value=math.fsum(w * v for w, v in zip(weights, values, strict=True)),
        stderr=math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))),
        questions=sum(sizes),
        units=len(results),
        all_units=len(plan.units),
        details=results,
    )


def describe(score: TaskScore) -> str:
    part = f", {score.units} of {score.all_units} subjects" if score.units < score.all_units else ""
    return (
        f"  {score.title:<12}{100 * score.value:6.2f} ± {100 * score.stderr:.2f}   {score.metric}, "
        f"{score.questions} questions{part}"
    )
