"""What the documentation names exists: files, configurations, commands and their flags."""

import re
from pathlib import Path

import pytest

from solar_mega.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]
MAP = ROOT / "docs" / "paper_map.md"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=str)
PLACES = ("configs/", "launch/", "tests/", "docs/", "csrc/", "solar_mega/")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"^[\w*./+-]+(?:/|\.(?:py|toml|md|sh|json|jsonl|png|cpp|cu|h))$")
_STAGE = re.compile(r"^\d_[a-z]\w*(?:\+\w+)?$")
MADE = {"instruct.jsonl", "alignment.jsonl"}
"""Named in the map, written by a command."""


def rows() -> list[str]:
    return [line for line in MAP.read_text().splitlines() if line.startswith("| ")]


def exists(path: str) -> bool:
    """Of the repository, or of the package; `*` stands for anything."""
    return any(any(root.glob(path.rstrip("/"))) for root in (ROOT, ROOT / "solar_mega", ROOT / "docs"))


def test_every_file_of_the_map_exists() -> None:
    named = {word for row in rows() for code in _CODE.findall(row) for word in code.split()}
    paths = {word for word in named if _PATH.match(word)} - MADE
    assert len(paths) > 50
    assert not sorted(path for path in paths if not exists(path))


def test_every_stage_of_the_map_is_in_the_recipe() -> None:
    recipe = (ROOT / "launch" / "recipe.sh").read_text()
    stages = {code for row in rows() for code in _CODE.findall(row) if _STAGE.match(code)}
    assert len(stages) > 8 and not [stage for stage in stages if f"stage {stage} " not in recipe]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page) -> None:
    text = page.read_text()
    verbs = set(re.findall(r"solar-mega ([a-z]+)\b", text)) | set(re.findall(r"-m solar_mega ([a-z]+)", text))
    assert not verbs - VERBS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_of_the_repository_exists(page) -> None:
    words = {word for code in _CODE.findall(page.read_text()) for word in code.split()}
    links = set(re.findall(r"\]\((?!http)([^)#]+)", page.read_text()))
    gone = [word for word in words if word.startswith(PLACES) and _PATH.match(word) and not exists(word)]
    gone += [link for link in links if not (page.parent / link).exists()]
    assert not gone


def test_flags_of_the_maps_commands_exist(capsys) -> None:
    for code in {code for row in rows() for code in _CODE.findall(row) if code.startswith("solar-mega ")}:
        _, verb, *words = code.split()
        flags = [word for word in words if word.startswith("--") and word != "--help"]
        if not flags:
            continue
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in flags), (code, flags)
