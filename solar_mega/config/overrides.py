"""The words of a command line, read into settings: `--parallel.tp 2`, `--parallel.tp=2`, `--x=False`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from solar_mega.config.fields import MISSING, Field, Mismatch, did_you_mean, from_words, without_none
from solar_mega.errors import Problems

_FLAG = re.compile(r"--[A-Za-z]|-[A-Za-z]$")


def _normal(flag: str) -> str:
    """`--dry-run` and `--dry_run` are one flag."""
    return flag.lstrip("-").replace("-", "_")


def _take(field: Field, words: Sequence[str], start: int) -> int:
    """Where the words that belong to a flag end: a list takes all up to the next flag, a switch only a
    spelled-out true or false, everything else one word (which may be a negative number)."""
    end = start
    hint = without_none(field.type) or field.type
    if get_origin(hint) is tuple:
        limit = len(words) if Ellipsis in get_args(hint) else start + len(get_args(hint))
        while end < min(limit, len(words)) and not _FLAG.match(words[end]):
            end += 1
        return end
    present = start < len(words) and not _FLAG.match(words[start])
    if hint is bool:
        present = present and words[start].lower() in ("true", "false", "none")
    return start + int(present)


def read_words(
    fields: Mapping[str, Field], words: Sequence[str], problems: Problems, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Settings by dotted key. A flag given twice takes its last value, as everywhere. Names are never
    abbreviated. Flags that are not settings, surplus words and wrong values go to `problems`; a setting with
    a wrong value comes back as MISSING. `others` are names known elsewhere, for "did you mean"."""
    flags = {key: field for key, field in fields.items() if not field.positional}
    slots = [field for field in fields.values() if field.positional]
    bare: list[str] = []
    known = [field.flag for field in flags.values()] + list(others)
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, text = word.partition("=")
        if _FLAG.match(word) and _normal(name) in flags:
            field = flags[_normal(name)]
            end = position if equals else _take(field, words, position)
            given = [text] if equals else list(words[position:end])
            position = end
        elif _FLAG.match(word):
            problems.add(f"unknown flag {name}{_nearest_flag(name, known)}")
            while position < len(words) and not equals and not slots and not _FLAG.match(words[position]):
                position += 1  # its value, most likely: one mistake, one message
            continue
        else:
            bare.append(word)
            continue
        values[field.key] = _convert(field, given, problems)
    for field in slots:
        if bare:
            count = len(bare) if get_origin(field.type) is tuple else 1
            values[field.key] = _convert(field, bare[:count], problems)
            del bare[:count]
    for word in bare:
        problems.add(f"unexpected argument {word!r}; settings are given as --name value")
    return values


def _convert(field: Field, words: Sequence[str], problems: Problems) -> Any:
    try:
        return from_words(field.type, words)
    except Mismatch as mismatch:
        shown = " ".join(words) if words else "(nothing)"
        problems.add(f"{field.flag} {shown}: must be {mismatch}")
        return MISSING


def _nearest_flag(name: str, known: Sequence[str]) -> str:
    by_key = {_normal(flag): flag for flag in known}
    hint = did_you_mean(_normal(name), by_key)
    for key, flag in by_key.items():
        if hint == f"; did you mean {key}?":
            return f"; did you mean {flag}?"
    return ""
