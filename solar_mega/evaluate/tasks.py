"""The six tasks of H6 and how the two presets run them, as settings of lm-evaluation-harness.

| task          | leaderboard-v1 (the paper's)                   | lm-eval (today's defaults)     |
|---------------|------------------------------------------------|--------------------------------|
| ARC           | 25-shot acc_norm                               | 0-shot acc_norm                |
| HellaSwag     | 10-shot acc_norm                               | 0-shot acc_norm                |
| MMLU          | 5-shot acc, unweighted mean of the 57 subjects | 0-shot acc, mean of questions  |
| TruthfulQA    | 0-shot mc2                                     | the same                       |
| Winogrande    | 5-shot acc                                     | 0-shot acc                     |
| GSM8K         | 5-shot exact match after "####", v1's stops    | 5-shot exact match after "####"|

Where leaderboard-v1 is not bit for bit the board of 2023: few-shot examples are drawn by today's sampler.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from solar_mega.errors import UserError

Preset = Literal["leaderboard-v1", "lm-eval"]
PRESETS: tuple[Preset, ...] = ("leaderboard-v1", "lm-eval")


@dataclass(frozen=True)
class TaskPlan:
    """One row of the result."""

    name: str
    """As lm-evaluation-harness calls it."""
    title: str
    metric: str | None
    """The score, as `metric,filter`; None for the first one the task has."""
    fewshot: int | None
    """None: what the task itself says."""
    units: tuple[str, ...]
    """The tasks it is the mean of; itself, except for MMLU."""
    weighted: bool = False
    """Units count by their number of questions."""
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def in_h6(self) -> bool:
        return self.name in H6


_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine college_physics
    computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
    formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
    high_school_european_history high_school_geography high_school_government_and_politics
    high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history
    high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous
    moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies
    sociology us_foreign_policy virology world_religions
"""
SUBJECTS = tuple(_SUBJECTS.split())
"""Of MMLU (Hendrycks et al. 2020), 57."""

H6 = {
    "arc_challenge": "ARC",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
}
"""Task -> its name in the paper, in the order of its tables."""

ALIASES = {"arc": "arc_challenge", "truthfulqa": "truthfulqa_mc2", **{t.lower(): n for n, t in H6.items()}}

_METRICS = {
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "mmlu": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
}
_V1_FEWSHOT = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
}
_V1_OVERRIDES = {
    # The harness of 2023 also stopped at any colon, and compared the number as written but for commas.
    "gsm8k": {
        "generation_kwargs": {
            "until": [":", "Question:", "Question"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 256,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": False,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "(?s).*#### "],
            }
        ],
    },
}
DIRECTORIES = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")
"""Where the harness keeps these tasks, so that its index of thousands need not be read for them."""


def plan_tasks(names: tuple[str, ...], preset: str) -> list[TaskPlan]:
    """What to run for `--tasks` (empty: H6) under a preset. Names that are not of H6 go to the harness as
    they are. Raises UserError for an unknown preset."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--preset {preset}: unknown{hint}; allowed: {', '.join(PRESETS)}")
    wanted = [ALIASES.get(name.lower(), name) for name in names] or list(H6)
    return [_plan(name, preset) for name in dict.fromkeys(wanted)]


def _plan(name: str, preset: str) -> TaskPlan:
    v1 = preset == "leaderboard-v1"
    if name not in H6:
        subject = name.removeprefix("mmlu_")
        known = subject in SUBJECTS
        return TaskPlan(name, name, "acc,none" if known else None, 5 if v1 and known else None, (name,))
    return TaskPlan(
        name=name,
        title=H6[name],
        metric=_METRICS[name],
        fewshot=_V1_FEWSHOT[name] if v1 else None,
        units=tuple(f"mmlu_{subject}" for subject in SUBJECTS) if name == "mmlu" else (name,),
        weighted=not v1,
        overrides=_V1_OVERRIDES.get(name, {}) if v1 else {},
    )
