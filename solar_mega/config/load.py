"""Strict TOML and dotted overrides into frozen dataclasses, and back.

The file's tables are the configuration's sections; a later source wins over an earlier one: defaults in
schema.py, then the file, then the command line. Relative paths, in the file too, are relative to the
directory the program was started in. Nothing is guessed: an unknown key, a value of the wrong type and a
missing key are errors, all reported at once.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from solar_mega.config.fields import (
    MISSING,
    Field,
    Mismatch,
    allowed,
    build,
    did_you_mean,
    fields_of,
    from_toml,
)
from solar_mega.config.overrides import read_words
from solar_mega.errors import Problems, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def load_config(cls: type[Config], toml: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `toml` (None: defaults only) with command-line `overrides` on top.

    >>> load_config(PretrainConfig, Path("pretrain.toml"), ["--parallel.tp", "2", "--train.steps=100"])

    Raises UserError listing every unknown key (with the nearest known one), wrong value and missing key."""
    problems = Problems()
    values = read_settings(cls, toml, overrides, problems)
    report_missing(fields_of(cls), values, toml, problems)
    problems.raise_if_any(source_name(toml, overrides))
    return build(cls, values)


def source_name(toml: Path | None, overrides: Sequence[str]) -> str:
    """What to call the place the settings came from."""
    if toml is None:
        return "command line"
    return f"{toml} and command line" if overrides else str(toml)


def read_settings(
    cls: type, toml: Path | None, overrides: Sequence[str], problems: Problems, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Settings by dotted key, the command line over the file; one whose value is wrong is MISSING."""
    fields = fields_of(cls)
    values = read_table(toml, fields, problems) if toml is not None else {}
    return {**values, **read_words(fields, overrides, problems, others)}


def read_table(toml: Path, fields: Mapping[str, Field], problems: Problems) -> dict[str, Any]:
    """The file's settings by dotted key; unknown keys and wrong values go to `problems`."""
    return _read_table(read_toml(toml), fields, problems)


def report_missing(
    fields: Mapping[str, Field], values: Mapping[str, Any], toml: Path | None, problems: Problems
) -> None:
    """Adds a problem for every required setting that nobody gave."""
    for key, field in fields.items():
        if key in values or field.default is not MISSING:
            continue
        if field.positional and toml is None:
            problems.add(f"missing argument {field.flag} ({allowed(field.type)})")
        elif toml is None:
            problems.add(f"missing {field.flag} ({allowed(field.type)})")
        else:
            section, _, name = key.rpartition(".")
            place = f"[{section}] {name} = ..." if section else f"{name} = ..."
            what = f"missing {key} ({allowed(field.type)})"
            given = f"the argument {field.flag}" if field.positional else field.flag
            problems.add(f"{what}: write `{place}` in the file, or give {given}")


def read_toml(path: Path) -> dict[str, Any]:
    """The file as nested dicts. Raises UserError when it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        names = sorted(str(near) for near in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--config {path}: no such file (looked from {Path.cwd()}){hint}") from None
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None


def _read_table(
    table: Mapping[str, Any], fields: Mapping[str, Field], problems: Problems, prefix: str = ""
) -> dict[str, Any]:
    sections = {key[: dot + 1] for key in fields for dot, letter in enumerate(key) if letter == "."}
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if key + "." in sections:
            if isinstance(value, dict):
                values |= _read_table(value, fields, problems, key + ".")
            else:
                problems.add(f"{key} = {_shown(value)}: must be a table; write `[{key}]` and its keys below")
        elif key in fields:
            try:
                values[key] = from_toml(fields[key].type, value)
            except Mismatch as mismatch:
                problems.add(f"{key} = {_shown(value)}: must be {mismatch}")
                values[key] = MISSING
        elif isinstance(value, dict):
            names = {section[:-1] for section in sections}
            problems.add(f"unknown table [{key}]{did_you_mean(key, names) or _list(names)}")
        else:
            problems.add(f"unknown key {key} = {_shown(value)}{did_you_mean(key, fields)}")
    return values


def _list(names: set[str]) -> str:
    return "; known are " + ", ".join(sorted(names))


def _shown(value: Any) -> str:
    """A value as the file spells it, cut to a line."""
    text = _toml_value(value) if not isinstance(value, dict) else "{...}"
    return text if len(text) <= 60 else text[:57] + "..."


def to_toml(config: Any) -> str:
    """The configuration as TOML that `load_config` reads back to an equal value. A setting that is None is
    left out (TOML has no null; None is always the default of a setting that can be None)."""
    lines: list[str] = []
    _write_table(config, "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(config: Any, prefix: str, lines: list[str]) -> None:
    members = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in members.items():
        if value is not None and not dataclasses.is_dataclass(value):
            lines.append(f"{name} = {_toml_value(value)}")
    for name, value in members.items():
        if dataclasses.is_dataclass(value):
            lines += ["", f"[{prefix}{name}]"]
            _write_table(value, f"{prefix}{name}.", lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, Path)):
        # JSON's escapes are all TOML's; TOML wants DEL escaped too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value) if isinstance(value, (int, float)) else str(value)
