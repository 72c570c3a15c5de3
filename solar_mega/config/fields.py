"""The fields of a configuration dataclass as a flat table, and the one rule by which a value from a TOML
file or a word from the command line becomes a Python value."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from tyro.conf import Positional

MISSING = dataclasses.MISSING


class Mismatch(Exception):
    """A value that its field does not allow; the message says what is allowed."""


@dataclass(frozen=True)
class Field:
    """One setting. `key` is its dotted name (`parallel.tp`), which is both its place in the TOML file and
    its flag; `type` has Annotated taken off; `default` is MISSING when the setting is required."""

    key: str
    type: Any
    default: Any
    positional: bool

    @property
    def flag(self) -> str:
        """How it is spelled on the command line: sections as in the file, verb options with hyphens."""
        if self.positional:
            return self.key.upper()
        return "--" + (self.key if "." in self.key else self.key.replace("_", "-"))


def fields_of(cls: type, prefix: str = "") -> dict[str, Field]:
    """Every setting of a (nested) dataclass, in order, by dotted key."""
    hints = typing.get_type_hints(cls, include_extras=True)
    table: dict[str, Field] = {}
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        positional = False
        if typing.get_origin(hint) is Annotated:
            positional = hint == Positional[hint.__origin__]
            hint = hint.__origin__
        if dataclasses.is_dataclass(hint):
            table.update(fields_of(hint, key + "."))
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        table[key] = Field(key, hint, default, positional)
    return table


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass holding `values` (by dotted key), defaults elsewhere; no required one is absent."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values, key + ".")
        elif key in values:
            arguments[field.name] = values[key]
    return cls(**arguments)


def without_none(hint: Any) -> Any | None:
    """X for `X | None`, None for anything else."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if len(inner) == 1 and len(typing.get_args(hint)) == 2:
            return inner[0]
    return None


_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", Path: "paths"}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}


def allowed(hint: Any) -> str:
    """What a field of this type takes, in words."""
    if (inner := without_none(hint)) is not None:
        return allowed(inner)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        plural = _PLURALS.get(items[0], "values")
        return f"a list of {plural}" if Ellipsis in items else f"a list of {len(items)} {plural}"
    if hint in _WORDS:
        return _WORDS[hint]
    raise TypeError(f"configuration fields of type {hint!r} are not supported")


def from_toml(hint: Any, value: Any) -> Any:
    """A value as TOML gives it (int, float, bool, str, list), checked and made the field's type: a whole
    number passes for a float, a list for a tuple, a string for a path, nothing else for anything else.
    Raises Mismatch."""
    if (inner := without_none(hint)) is not None:
        return from_toml(inner, value)
    origin = typing.get_origin(hint)
    if origin is Literal:
        for option in typing.get_args(hint):
            if type(option) is type(value) and option == value:
                return option
    elif origin is tuple and isinstance(value, list):
        items = typing.get_args(hint)
        if Ellipsis in items:
            return tuple(from_toml(items[0], item) for item in value)
        if len(items) == len(value):
            return tuple(from_toml(item, given) for item, given in zip(items, value, strict=True))
    elif hint is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        raise Mismatch(f"a whole number; write {int(value)}")
    raise Mismatch(allowed(hint))


def from_words(hint: Any, words: Sequence[str]) -> Any:
    """The words after a flag, checked and made the field's type. Raises Mismatch."""
    if (inner := without_none(hint)) is not None:
        return None if [word.lower() for word in words] == ["none"] else from_words(inner, words)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return from_toml(hint, [_plain(item, word) for word in words])
    if hint is bool and not words:
        return True
    if len(words) != 1:
        raise Mismatch(allowed(hint))
    return from_toml(hint, _plain(hint, words[0]))


def _plain(hint: Any, word: str) -> Any:
    """The TOML value that a word stands for in a field of this type; the word itself where it stands for
    none, which from_toml then refuses."""
    try:
        if hint is int or hint is float:
            try:
                return int(word)
            except ValueError:
                return float(word)
        if hint is bool:
            return {"true": True, "false": False}[word.lower()]
        if typing.get_origin(hint) is Literal:
            return {str(option): option for option in typing.get_args(hint)}[word]
    except (ValueError, KeyError):
        pass
    return word


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean parallel.tp?`, or nothing when no known name comes near. The same last word in another
    section counts as near: `train.lr` is meant for `optimizer.lr`."""
    known = list(known)
    given = given.replace("-", "_")
    elsewhere = [name for name in known if name.rpartition(".")[2] == given.rpartition(".")[2]]
    near = elsewhere or difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if not near:
        last = {name.rpartition(".")[2]: name for name in known}
        close = difflib.get_close_matches(given.rpartition(".")[2], last, n=1, cutoff=0.75)
        near = [last[name] for name in close]
    return f"; did you mean {near[0]}?" if near else ""
