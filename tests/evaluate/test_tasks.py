"""Presets, task files, and what is said of bad ones."""

import pytest

from solar_mega.errors import UserError
from solar_mega.evaluate.report import ModelResult, rows_of, write_report
from solar_mega.evaluate.run import TaskScore, _combined
from solar_mega.evaluate.task_files import find_task_files
from solar_mega.evaluate.tasks import H6, SUBJECTS, TaskPlan, plan_tasks


def test_the_preset_of_the_paper():
    plans = {plan.name: plan for plan in plan_tasks((), "leaderboard-v1")}
    assert list(plans) == list(H6)
    assert {name: plan.fewshot for name, plan in plans.items()} == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    assert len(SUBJECTS) == len(set(plans["mmlu"].units)) == 57 and not plans["mmlu"].weighted
    assert plans["gsm8k"].overrides["generation_kwargs"]["until"] == [":", "Question:", "Question"]
    assert plans["arc_challenge"].metric == plans["hellaswag"].metric == "acc_norm,none"


def test_the_preset_of_today_leaves_the_harness_alone():
    for plan in plan_tasks((), "lm-eval"):
        assert plan.fewshot is None and not plan.overrides and plan.weighted


@pytest.mark.parametrize("preset", ["leaderboard", "v1"])
def test_unknown_preset(preset):
    with pytest.raises(UserError, match="leaderboard-v1, lm-eval"):
        plan_tasks((), preset)


def test_unknown_task_is_named_with_the_nearest():
    from solar_mega.evaluate.run import Evaluation, Settings

    plans = [TaskPlan("mmlu_virolgy", "x", None, None, ("mmlu_virolgy",))]
    with pytest.raises(UserError, match="mmlu_virolgy: unknown task; did you mean mmlu_virology"):
        Evaluation(plans, None, Settings("lm-eval", None, False, False))


def test_self_made_files_are_complete(task_files):
    files = find_task_files(task_files, plan_tasks((), "leaderboard-v1"))
    assert len(files) == 5 + 3 and files["mmlu_formal_logic"].test_split == "test"


def test_a_record_with_missing_fields_is_named(task_files, tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    good = (task_files / "gsm8k" / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(good)
    (folder / "test.jsonl").write_text('{"question": "a"}\n{"question": 3, "answer": "b"}\nnot json\n')
    with pytest.raises(UserError) as caught:
        find_task_files(tmp_path, plan_tasks(("gsm8k",), "leaderboard-v1"))
    text = str(caught.value)
    assert "test.jsonl:1: no field answer (it has question)" in text
    assert "test.jsonl:2: question is int '3', not text" in text
    assert "test.jsonl:3: is no JSON object" in text


def test_missing_files_say_what_goes_where(tmp_path):
    with pytest.raises(UserError) as caught:
        find_task_files(tmp_path, plan_tasks(("arc", "gsm8k"), "leaderboard-v1"))
    text = str(caught.value)
    assert "DATA/arc_challenge/: test.jsonl, train.jsonl (few-shot examples)" in text
    assert "DATA/gsm8k/: test.jsonl, train.jsonl" in text


def test_too_few_examples_are_noticed(task_files, tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = (task_files / "gsm8k" / "test.jsonl").read_text().splitlines(True)
    (folder / "test.jsonl").write_text("".join(lines))
    (folder / "train.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UserError, match="has 3 records; 5 examples are drawn from it"):
        find_task_files(tmp_path, plan_tasks(("gsm8k",), "leaderboard-v1"))


def test_no_network_and_no_files_say_what_goes_where():
    from solar_mega.evaluate.run import _hub_errors

    (plan,) = plan_tasks(("winogrande",), "leaderboard-v1")
    with pytest.raises(UserError, match="DATA/winogrande/: validation.jsonl"), _hub_errors(plan):
        raise ConnectionError("no route to host")
    with pytest.raises(ZeroDivisionError), _hub_errors(plan):
        raise ZeroDivisionError


def unit(value: float, stderr: float, questions: int) -> dict:
    return {"metrics": {"acc,none": value, "acc_stderr,none": stderr}, "questions": questions}


@pytest.mark.parametrize(("weighted", "value"), [(False, 0.5), (True, 0.3)])
def test_mean_of_subjects(weighted, value):
    plan = TaskPlan("mmlu", "MMLU", "acc,none", 5, ("a", "b"), weighted)
    score = _combined(plan, {"a": unit(0.2, 0.03, 30), "b": unit(0.8, 0.04, 6)})
    assert score.value == pytest.approx(value)
    weights = (30 / 36, 6 / 36) if weighted else (0.5, 0.5)
    assert score.stderr == pytest.approx(((weights[0] * 0.03) ** 2 + (weights[1] * 0.04) ** 2) ** 0.5)


def score(name: str, value: float) -> TaskScore:
    return TaskScore(name, H6[name], "acc,none", value, 0.01, 10, 1, 1, {})


def test_side_by_side_with_a_missing_task():
    whole = ModelResult("a", "a", tuple(score(name, 0.5) for name in H6))
    part = ModelResult("b", "b", (score("gsm8k", 0.25),))
    rows, headers = rows_of([whole, part])
    assert headers == ["model", "H6 (Avg.)", *H6.values()]
    assert rows[0][1] == "50.00 ± 0.41" and rows[1][1:] == ["–"] * 6 + ["25.00 ± 1.00"]


def test_an_evaluation_with_models_to_come_has_no_results_yet(tmp_path):
    """What an interrupted one leaves must not look like the whole."""
    result = ModelResult("a", "a", (score("gsm8k", 0.25),))
    write_report([result], tmp_path, complete=False)
    assert {path.name for path in tmp_path.iterdir()} == {"so_far.json", "so_far.md", "so_far.png"}
    write_report([result], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}


def test_configurations_of_the_recipe_are_readable():

    from solar_mega.config.command_line import parse_options
    from solar_mega.evaluate.command import EvaluateOptions
    from solar_mega.evaluate.contamination_command import ContaminationOptions

    for folder in ("tiny", "solar_10_7b"):
        options = parse_options(
            EvaluateOptions, ["--config", f"configs/{folder}/7_evaluate.toml"], "evaluate"
        )
        assert options.models and options.preset == "leaderboard-v1"
        test = parse_options(
            ContaminationOptions, ["--config", f"configs/{folder}/6_contamination.toml"], "contamination"
        )
        assert test.model and test.reference
