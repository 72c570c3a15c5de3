"""The help page of a verb, drawn by tyro from the dataclasses: every setting, its docstring, its value."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import tyro

from solar_mega.config.fields import MISSING


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass (bases included), as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs


def _page(cls: type, values: Mapping[str, Any], prefix: str = "") -> type:
    """`cls` again, with `values` (by dotted key) as defaults and its docstrings as tyro wraps them best."""
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = field_docs(cls)
    members = []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            section = _page(hint, values, key + ".")
            members.append((field.name, section, dataclasses.field(default_factory=section)))
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = values.get(key, default)
        default = tyro.MISSING if default is MISSING else default
        # A space, because tyro prints comments near the field when there is no text at all.
        hint = Annotated[hint, tyro.conf.arg(help=docs.get(field.name, " "))]
        members.append((field.name, hint, dataclasses.field(default=default)))
    page = dataclasses.make_dataclass(cls.__name__, members)
    written = cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")  # dataclass() makes one up
    page.__doc__ = cls.__doc__ if written else ""
    return page


def print_help(verb: str, options: type, settings: type | None, values: Mapping[str, Any]) -> NoReturn:
    """Prints the page and raises SystemExit(0). `values` are shown as defaults. With `settings` the page
    holds both dataclasses and spells flags with underscores, as the TOML keys they are."""
    page, about = _page(options, values), options.__doc__
    if settings is not None:
        flat = tyro.conf.arg(name="")
        halves = {"options": page, "settings": _page(settings, values)}
        members = [
            (name, Annotated[half, flat], dataclasses.field(default_factory=half))
            for name, half in halves.items()
        ]
        page, about = dataclasses.make_dataclass("Page", members), settings.__doc__
    tyro.cli(
        page,
        args=["--help"],
        prog=f"solar-mega {verb}",
        description=about,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=settings is not None,
    )
    raise SystemExit(0)
