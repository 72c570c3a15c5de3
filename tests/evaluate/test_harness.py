"""The paper's tasks through our model and through the harness's own: scores and log-likelihoods equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_ranks

LAYOUTS = ((2, 1), (1, 2), (1, 1))
LIMIT = 4


def settings(model: Path, data: Path, out: Path, **changes):
    from solar_mega.evaluate.command import EvaluateOptions

    return EvaluateOptions(
        **{"models": (model,), "data": data, "out": out, "limit": LIMIT, "log_samples": True, **changes}
    )


def on_layouts(model: Path, data: Path, out: Path) -> None:
    from solar_mega.evaluate.command import prepare_harness, run

    prepare_harness()
    for tp, pp in LAYOUTS:
        run(settings(model, data, out / f"tp{tp}pp{pp}", tp=tp, pp=pp))


def solar_mega(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "solar_mega", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def samples(out: Path) -> dict[str, list[dict]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*/*.samples.jsonl"))
    }


def scores(out: Path) -> dict[str, float]:
    (result,) = json.loads((out / "results.json").read_text())
    return {score["name"]: score["value"] for score in result["scores"]}


@pytest.fixture(scope="module")
def runs(model_dir, task_files, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("results")
    run_ranks(on_layouts, 2, model_dir, task_files, root)
    flags = ["--data", str(task_files), "--limit", str(LIMIT), "--log-samples"]
    for name, more in {"hf": ["--backend", "hf"], "alone": []}.items():
        done = solar_mega("evaluate", str(model_dir), *flags, "--out", str(root / name), *more)
        assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("name", ["alone", "tp2pp1", "tp1pp2", "tp1pp1"])
def test_every_layout_answers_as_the_harness_own_model(runs, name):
    ours, theirs = samples(runs[name]), samples(runs["hf"])
    assert ours.keys() == theirs.keys() and len(ours) == 8  # six tasks, MMLU with three subjects
    assert scores(runs[name]) == pytest.approx(scores(runs["hf"]), abs=1e-6)
    for task, mine in ours.items():
        for one, other in zip(mine, theirs[task], strict=True):
            for (answer,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(expected, str):
                    assert answer == expected
                else:
                    assert float(answer[0]) == pytest.approx(float(expected[0]), abs=1e-3)
                    assert str(answer[1]) == str(expected[1])


def test_results_tell_everything(runs):
    (result,) = json.loads((runs["alone"] / "results.json").read_text())
    by_name = {score["name"]: score["value"] for score in result["scores"]}
    assert result["h6"][0] == pytest.approx(sum(by_name.values()) / 6)
    assert result["partial"] and result["facts"]["preset"] == "leaderboard-v1"
    table = (runs["alone"] / "results.md").read_text()
    assert "H6 (Avg.)" in table and "Not the whole benchmark" in table
    assert (runs["alone"] / "results.png").stat().st_size > 10_000


def test_finished_tasks_are_not_run_again(runs, model_dir, task_files):
    place = runs["alone"] / "tiny" / "winogrande.json"
    kept = json.loads(place.read_text())
    kept["result"]["metrics"]["acc,none"] = 0.125
    place.write_text(json.dumps(kept))
    words = ["evaluate", str(model_dir), "--data", str(task_files), "--limit", str(LIMIT), "--log-samples"]
    done = solar_mega(*words, "--tasks", "winogrande", "--out", str(runs["alone"]))
    assert done.returncode == 0 and "12.50" in done.stdout
    done = solar_mega(*words, "--tasks", "winogrande", "--out", str(runs["alone"]), "--max-length", "300")
    assert done.returncode == 0 and "12.50" not in done.stdout
