"""`solar-mega tables`: the paper's tables with our own results in the rows beside the published ones.

The tables are data (configs/ablations/tables.toml); the results are what `evaluate` wrote.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.config.command_line import parse_options
from solar_mega.config.load import read_toml
from solar_mega.errors import Problems, UserError
from solar_mega.evaluate.tasks import H6
from solar_mega.runtime.console import say, table
from solar_mega.runtime.files import atomic_file

COLUMNS = ("H6 (Avg.)", *H6.values())


@dataclass(frozen=True)
class TablesOptions:
    """Print the paper's tables filled with this project's results."""

    tables: Path = Path("configs/ablations/tables.toml")
    """Which rows there are, what was published, and which model stands beside it."""

    results: tuple[Path, ...] = ()
    """results.json files of `solar-mega evaluate`."""

    root: Path = Path("runs/tiny")
    """Where the models of the recipe are."""

    note: str = ""
    """What readers must know of our models, printed above every table."""

    out: Path | None = None
    """Write the tables as Markdown too."""


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    model: str
    published: tuple[float, ...]
    """Percent, in the order of COLUMNS."""


@dataclass(frozen=True)
class PaperTable:
    title: str
    rows: tuple[Row, ...]


Scores = dict[Path, dict[str, tuple[float, float]]]
"""Model directory -> column -> (percent, standard error in percent or NaN)."""


def tables(argv: Sequence[str]) -> int:
    """`solar-mega tables`"""
    options = parse_options(TablesOptions, argv, "tables")
    paper = read_tables(options.tables)
    ours = read_results(options.results)
    note = options.note or "ours beside the published figures"
    lines, missing = [], []
    for one in paper:
        rows, without = filled(one, ours, options.root)
        missing += without
        headers = ("model", "", *COLUMNS)
        say(f"{one.title}\n({note})\n{table(rows, headers)}\n")
        lines += [f"### {one.title}", "", f"({note})", "", _markdown(rows, headers), ""]
    if options.out is not None:
        with atomic_file(options.out) as stream:
            stream.write("\n".join(lines))
        say(f"{options.out}")
    if missing:
        say(f"no result of ours for {', '.join(dict.fromkeys(missing))}")
    return 0


def read_tables(path: Path) -> list[PaperTable]:
    """Raises UserError listing everything that is not as it should be."""
    content, problems, found = read_toml(path), Problems(), []
    for number, given in enumerate(content.get("table", []), 1):
        rows = []
        for row in given.get("rows", []):
            where = f"table {number}, row {row.get('name', '?')!r}"
            unknown = row.keys() - {"name", "what", "model", "published"}
            if unknown:
                problems.add(f"{where}: unknown key {', '.join(sorted(unknown))}")
            if len(row.get("published", [])) != len(COLUMNS):
                problems.add(f"{where}: published must be {len(COLUMNS)} numbers, {', '.join(COLUMNS)}")
            if not row.get("name") or not row.get("model"):
                problems.add(f"{where}: name and model are needed")
            values = tuple(map(float, row.get("published", [])))
            rows.append(Row(row.get("name", ""), row.get("what", ""), row.get("model", ""), values))
        found.append(PaperTable(given.get("title", f"Table {number}"), tuple(rows)))
    if not found:
        problems.add("no [[table]]")
    problems.raise_if_any(str(path))
    return found


def read_results(paths: Sequence[Path]) -> Scores:
    """Raises UserError for a file that `evaluate` did not write."""
    scores: Scores = {}
    for path in paths:
        try:
            content = json.loads(path.read_text("utf-8"))
            for model in content:
                scores[Path(model["path"]).resolve()] = _columns(model)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--results {path}: not results of solar-mega evaluate: {error!r}") from None
    return scores


def _columns(model: dict[str, Any]) -> dict[str, tuple[float, float]]:
    by_title = {s["title"]: (100 * s["value"], 100 * s["stderr"]) for s in model["scores"]}
    if model.get("h6") is not None:
        by_title[COLUMNS[0]] = (100 * model["h6"][0], 100 * model["h6"][1])
    return by_title


def filled(paper: PaperTable, ours: Scores, root: Path) -> tuple[list[list[str]], list[str]]:
    """(two rows for each of the paper's: published and ours, models without results)."""
    rows, missing = [], []
    for row in paper.rows:
        rows.append([row.name, "published", *(f"{value:.2f}" for value in row.published)])
        place = (root / row.model).resolve()
        found = next(
            (scores for path, scores in ours.items() if place == path or place in path.parents), None
        )
        if found is None:
            missing.append(row.model)
        rows.append([row.what, "ours", *(_cell(found, column) for column in COLUMNS)])
    return rows, missing


def _cell(scores: dict[str, tuple[float, float]] | None, column: str) -> str:
    if scores is None or column not in scores:
        return "–"
    value, error = scores[column]
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} ± {error:.2f}"


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, ["---"] * len(headers), *rows))
