"""Results of several models side by side: console table, JSON, Markdown, bars."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from solar_mega.evaluate.run import TaskScore
from solar_mega.evaluate.tasks import H6
from solar_mega.runtime.console import table
from solar_mega.runtime.files import atomic_file

_COLOURS = ("#3d7ea6", "#d1495b", "#edae49", "#66a182", "#7d8597", "#8d5a97", "#22303c", "#c97b63")


@dataclass(frozen=True)
class ModelResult:
    """Everything measured of one model."""

    name: str
    path: str
    scores: tuple[TaskScore, ...] = ()
    perplexity: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def h6(self) -> tuple[float, float] | None:
        """Mean of the six tasks and its standard error, as shares of 1; None unless all six were run."""
        by_name = {score.name: score for score in self.scores}
        if any(name not in by_name for name in H6):
            return None
        six = [by_name[name] for name in H6]
        mean = math.fsum(score.value for score in six) / len(six)
        return mean, math.sqrt(math.fsum(score.stderr**2 for score in six)) / len(six)

    @property
    def partial(self) -> bool:
        """Whether a task ran on a part of its subjects or questions."""
        return bool(self.facts.get("limit")) or any(s.units < s.all_units for s in self.scores)


def rows_of(results: Sequence[ModelResult]) -> tuple[list[list[str]], list[str]]:
    """(rows, headers): model, H6, then each task, in percent with standard errors."""
    titles = list(dict.fromkeys(score.title for result in results for score in result.scores))
    headers = ["model"]
    with_h6 = any(result.h6() is not None for result in results)
    headers += ["H6 (Avg.)"] if with_h6 else []
    headers += titles
    with_ppl = any(result.perplexity for result in results)
    headers += ["perplexity", "bits/byte"] if with_ppl else []
    rows = []
    for result in results:
        row = [result.name]
        if with_h6:
            row.append("–" if (h6 := result.h6()) is None else _percent(*h6))
        by_title = {score.title: score for score in result.scores}
        for title in titles:
            row.append(_percent(by_title[title].value, by_title[title].stderr) if title in by_title else "–")
        if with_ppl:
            ppl = result.perplexity
            row += [f"{ppl['perplexity']:.3f}", f"{ppl['bits_per_byte']:.4f}"] if ppl else ["–", "–"]
        rows.append(row)
    return rows, headers


def _percent(value: float, stderr: float) -> str:
    return f"{100 * value:.2f}" if math.isnan(stderr) else f"{100 * value:.2f} ± {100 * stderr:.2f}"


def console_table(results: Sequence[ModelResult]) -> str:
    rows, headers = rows_of(results)
    return table(rows, headers) + notes(results)


def notes(results: Sequence[ModelResult]) -> str:
    if not any(result.partial for result in results):
        return ""
    return (
        "\nNot the whole benchmark: a part of the questions or subjects (--limit, or what the data "
        "directory has)."
    )


def write_report(results: Sequence[ModelResult], out: Path, complete: bool = True) -> list[Path]:
    """results.json, results.md and, with task scores, results.png in `out`. Returns what was written.

    While models are missing the names are so_far.*: results.json says that the evaluation is through.
    """
    name = "results" if complete else "so_far"
    rows, headers = rows_of(results)
    content = [asdict(result) | {"h6": result.h6(), "partial": result.partial} for result in results]
    with atomic_file(out / f"{name}.json") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    with atomic_file(out / f"{name}.md") as stream:
        stream.write("| " + " | ".join(headers) + " |\n|" + "---|" * len(headers) + "\n")
        stream.writelines("| " + " | ".join(row) + " |\n" for row in rows)
        stream.write(notes(results) + "\n")
    written = [out / f"{name}.json", out / f"{name}.md"]
    if any(result.scores for result in results):
        plot(results, out / f"{name}.png")
        written.append(out / f"{name}.png")
    if complete:
        for early in out.glob("so_far.*"):
            early.unlink()
    return written


def plot(results: Sequence[ModelResult], path: Path) -> None:
    """Bars with standard errors, a group per task and H6 first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(score.title for result in results for score in result.scores))
    with_h6 = any(result.h6() is not None for result in results)
    groups = (["H6 (Avg.)"] if with_h6 else []) + titles
    width = 0.8 / len(results)
    many = len(results) > 4  # then the legend is a column of its own
    colours = _COLOURS if len(results) <= len(_COLOURS) else plt.colormaps["tab20"].colors
    inches = max(6.0, 1.0 + (2.0 if many else 1.25) * len(groups)) + (2.6 if many else 0.0)
    figure, axis = plt.subplots(figsize=(inches, 4.4))
    for number, result in enumerate(results):
        by_title = {score.title: (score.value, score.stderr) for score in result.scores}
        if (h6 := result.h6()) is not None:
            by_title["H6 (Avg.)"] = h6
        places, values, errors = [], [], []
        for group, title in enumerate(groups):
            if title in by_title:
                value, error = by_title[title]
                places.append(group + (number - (len(results) - 1) / 2) * width)
                values.append(100 * value)
                errors.append(0.0 if math.isnan(error) else 100 * error)
        axis.bar(
            places,
            values,
            width * 0.92,
            label=result.name,
            color=colours[number % len(colours)],
            yerr=errors,
            error_kw={"elinewidth": 0.9, "ecolor": "#22303c", "capsize": 2},
        )
        if len(results) * len(groups) <= 24:
            for place, value, error in zip(places, values, errors, strict=True):
                axis.annotate(f"{value:.1f}", (place, value + error + 1), ha="center", fontsize=7)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(0, 105)
    axis.set_ylabel("score, percent (whiskers: one standard error)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dfe5ea", linewidth=0.8)
    axis.set_axisbelow(True)
    if many:
        figure.legend(frameon=False, loc="center right", fontsize=8)
        figure.tight_layout(rect=(0, 0, 1 - 2.5 / inches, 1))
    else:
        figure.legend(frameon=False, ncols=len(results), loc="upper center", fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
