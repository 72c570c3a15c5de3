"""The import rules that keep the tree readable from top to bottom, checked on the syntax of every file."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "solar_mega"

LAYERS = (
    {"__main__"},
    {"quickstart"},
    {"evaluate", "align", "merge", "bench", "plan"},
    {"train"},
    {"data", "checkpoint"},
    {"artifact", "depth", "model"},
    {"ops"},
)
"""From top to bottom: a room imports from its own layer and from those below."""

EVERYWHERE = {"config", "runtime", "errors", ""}
"""What everybody but ops may import ("" is the package itself, for its version)."""

HEAVY = {"torch", "megatron", "transformers", "datasets", "matplotlib"}
LIGHT = ("__init__.py", "__main__.py", "errors.py", "config", "depth", "artifact")
"""What `solar-mega --help` and the dry runs go through: no heavy import at module level."""

LIGHT_FILES = ("runtime/console.py", "runtime/metrics.py", "runtime/files.py", "runtime/gpus.py")


class Import(NamedTuple):
    file: str
    line: int
    module: str
    top_level: bool


def _module_level(tree: ast.Module) -> set[ast.stmt]:
    """Statements that run when the module is imported: not in functions, not for type checkers only."""
    found: set[ast.stmt] = set()

    def walk(statements: list[ast.stmt]) -> None:
        for node in statements:
            found.add(node)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                walk(node.orelse)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for name in ("body", "orelse", "finalbody"):
                    walk(getattr(node, name, []))
                for handler in getattr(node, "handlers", []):
                    walk(handler.body)

    walk(tree.body)
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(entry for path in sorted(PACKAGE.rglob("*.py")) for entry in imports_of(path))


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = _module_level(tree)
    file = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(file, node.lineno, name.name, node in outer)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write solar_mega...."
            # `from solar_mega import errors` and `from solar_mega.runtime import parallel` import modules.
            for name in node.names:
                yield Import(file, node.lineno, f"{node.module}.{name.name}", node in outer)


def room_of_file(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py").replace("__init__", "")


def room_of_module(module: str) -> str | None:
    """The room a module of ours is in; None for others' modules."""
    first, _, rest = module.partition(".")
    if first != "solar_mega":
        return None
    room = rest.partition(".")[0]
    return "" if not (PACKAGE / room).is_dir() and not (PACKAGE / f"{room}.py").is_file() else room


def spelled(found: list[Import]) -> str:
    return "\n".join(f"solar_mega/{entry.file}:{entry.line}: imports {entry.module}" for entry in found)


def test_every_room_has_a_place():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= set().union(*LAYERS, EVERYWHERE)


def test_imports_point_downwards():
    depth = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
    wrong = []
    for entry in imports():
        here, there = room_of_file(entry.file), room_of_module(entry.module)
        if there is None or there in EVERYWHERE or here == there:
            continue
        if here in EVERYWHERE or depth[there] < depth[here]:
            wrong.append(entry)
    assert not wrong, spelled(wrong)


def test_rooms_do_not_import_each_other_in_circles():
    uses: dict[str, set[str]] = {}
    for entry in imports():
        here, there = room_of_file(entry.file), room_of_module(entry.module)
        if there is not None and there not in EVERYWHERE and here not in EVERYWHERE and here != there:
            uses.setdefault(here, set()).add(there)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            room == goal or room not in seen and reaches(room, goal, seen | {room})
            for room in uses.get(start, ())
        )

    assert not [room for room in uses if reaches(room, room, {room})]


def test_ops_sees_only_torch():
    wrong = []
    for entry in imports():
        top = entry.module.partition(".")[0]
        if room_of_file(entry.file) != "ops" or top in sys.stdlib_module_names or top == "torch":
            continue
        if room_of_module(entry.module) != "ops" and entry.module != "solar_mega._C":
            wrong.append(entry)
    assert not wrong, spelled(wrong)


def test_megatron_core_only():
    wrong = [
        entry
        for entry in imports()
        if entry.module.partition(".")[0] == "megatron" and not entry.module.startswith("megatron.core")
    ]
    assert not wrong, spelled(wrong)


def test_light_modules_stay_light():
    wrong = [
        entry
        for entry in imports()
        if entry.top_level
        and entry.module.partition(".")[0] in HEAVY
        and (entry.file.partition("/")[0] in LIGHT or entry.file in LIGHT_FILES)
    ]
    assert not wrong, spelled(wrong)


@pytest.mark.parametrize(
    ("source", "top_level"),
    [
        ("import torch", True),
        ("try:\n    import torch\nexcept ImportError:\n    pass", True),
        ("if a:\n    pass\nelse:\n    from torch import nn", True),
        ("class A:\n    import torch", True),
        ("with a:\n    import torch", True),
        ("def f():\n    import torch", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", False),
    ],
)
def test_the_rules_see_what_they_should(tmp_path, source, top_level):
    path = tmp_path / "x.py"
    path.write_text(source)
    [entry] = [entry for entry in imports_of(path) if entry.module.startswith("torch")]
    assert entry.top_level is top_level
