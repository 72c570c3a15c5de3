"""Command lines of the verbs: an options dataclass per verb, alone or together with a configuration.

    @dataclass(frozen=True)
    class ConvertOptions:
        '''Grow a checkpoint by depth.'''            # heads the help page

        src: Positional[Path]                        # from tyro.conf
        '''Where from.'''

        layer_map: str = "identity"                  # --layer-map; --layer_map is the same flag
        '''...'''

    options = parse_options(ConvertOptions, argv, "convert")                     # verb without --config
    options, config = parse_run(RunOptions, PretrainConfig, argv, "pretrain")    # verb with --config

A verb whose options themselves may stand in a file has `config: Path | None = None` among them: the file's
keys are the other options, and the command line wins over it.

Both print help and raise SystemExit(0) on `--help`, and raise UserError listing everything that is wrong.
tyro draws the help page (help.py); the reading is done in overrides.py, because tyro stops at the first
error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from solar_mega.config.fields import MISSING, build, fields_of
from solar_mega.config.help import print_help
from solar_mega.config.load import read_settings, read_table, report_missing, source_name
from solar_mega.config.overrides import read_words
from solar_mega.errors import Problems, UserError

Options = TypeVar("Options")
Config = TypeVar("Config")


@dataclass(frozen=True)
class RunOptions:
    """Options of every verb that takes a configuration."""

    config: Path | None = None
    """TOML file; `--section.key value` overrides what it says. Relative paths, also those in the file,
    are relative to the current directory."""

    dry_run: bool = False
    """Check everything, print the resolved configuration and what would be done, and stop."""


def parse_options(cls: type[Options], argv: Sequence[str], verb: str) -> Options:
    """The options of a verb. Raises UserError; SystemExit(0) after `--help`."""
    if _wants_help(argv):
        print_help(verb, cls, None, {})
    problems, fields = Problems(), fields_of(cls)
    values = read_words(fields, argv, problems)
    toml = values.get("config")
    toml = None if toml is MISSING else toml
    if toml is not None:
        others = {key: field for key, field in fields.items() if key != "config"}
        values = {**read_table(toml, others, problems), **values}
    report_missing(fields, values, toml, problems)
    _raise(problems, verb, "command line" if toml is None else f"{toml} and command line")
    return build(cls, values)


def parse_run(
    options_cls: type[Options], config_cls: type[Config], argv: Sequence[str], verb: str
) -> tuple[Options, Config]:
    """The options of a verb (RunOptions or a dataclass with its fields) and its configuration, read from
    `--config` and dotted overrides. `--help` shows the values of the file when one is given.
    Raises UserError; SystemExit(0) after `--help`."""
    options = fields_of(options_cls)
    mine, theirs = _split([word for word in argv if word not in _HELP], options)
    problems = Problems()
    option_values = read_words(options, mine, problems)
    toml = option_values.get("config")
    toml = None if toml is MISSING else toml
    others = [field.flag for field in options.values()]
    values = read_settings(config_cls, toml, theirs, problems, others)
    if _wants_help(argv):
        print_help(verb, options_cls, config_cls, {**option_values, **values})
    report_missing(fields_of(config_cls), values, toml, problems)
    if toml is None and not theirs:
        problems.add("no --config FILE given; every setting may also be a flag")
    _raise(problems, verb, source_name(toml, theirs))
    return build(options_cls, option_values), build(config_cls, values)


def toml_of(argv: Sequence[str]) -> Path | None:
    """What `--config` names, for verbs whose other flags depend on it."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == "--config" and following is not None:
            return Path(following)
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
    return None


def _raise(problems: Problems, verb: str, source: str) -> None:
    try:
        problems.raise_if_any(source)
    except UserError as error:
        raise UserError(f"{error}\nAll settings: solar-mega {verb} --help") from None


_HELP = ("-h", "--help")


def _wants_help(argv: Sequence[str]) -> bool:
    return any(word in _HELP for word in argv)


def _split(argv: Sequence[str], options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The words of the verb's own flags, and the rest. A flag owns the words up to the next flag."""
    mine: list[str] = []
    theirs: list[str] = []
    target = theirs
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            target = mine if name in options else theirs
        target.append(word)
    return mine, theirs
