"""Option dataclasses of the verbs, with and without a configuration; the help page."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tyro.conf import Positional

from solar_mega.config.command_line import RunOptions, parse_options, parse_run
from solar_mega.config.fields import fields_of
from solar_mega.config.help import field_docs
from solar_mega.config.schema import PretrainConfig
from solar_mega.errors import UserError


@dataclass(frozen=True)
class Options:
    """Move things."""

    src: Positional[Path]
    """Where from."""

    dst: Positional[Path]
    """Where to."""

    layer_map: str = "identity"
    """Depth,
    on two lines."""

    dry_run: bool = False
    """Write nothing."""


@dataclass(frozen=True)
class ManyInputs:
    inputs: Positional[tuple[str, ...]]
    workers: int = 1


def test_positionals_and_switches():
    expected = Options(Path("a"), Path("b"), "dus:8", True)
    for words in (
        "a b --layer-map dus:8 --dry-run",
        "--dry-run a --layer_map=dus:8 b",
        "a --dry-run=true b --layer-map dus:8",
    ):
        assert parse_options(Options, words.split(), "move") == expected
    assert parse_options(ManyInputs, ["x", "--workers", "2", "y"], "many") == ManyInputs(("x", "y"), 2)


def test_all_problems_of_a_verb():
    with pytest.raises(UserError) as caught:
        parse_options(Options, ["--layer-mpa=x", "a", "--dry-run=perhaps"], "move")
    text = str(caught.value)
    assert "unknown flag --layer-mpa; did you mean --layer-map?" in text
    assert "--dry-run perhaps: must be true or false" in text
    assert "missing argument DST (a path)" in text
    assert text.endswith("solar-mega move --help")


def test_surplus_argument():
    with pytest.raises(UserError, match="unexpected argument 'c'"):
        parse_options(Options, ["a", "b", "c"], "move")


def test_help_of_a_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_options(Options, ["a", "--help"], "move")
    assert caught.value.code == 0
    page = capsys.readouterr().out
    for expected in ("solar-mega move", "Move things.", "Where from.", "--layer-map", "Depth, on two lines."):
        assert expected in page


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        '[model]\npath = "base"\n[train]\nsteps = 4321\nseq_length = 8\nglobal_batch_size = 2\n'
        '[data]\ntrain = ["a"]\n[output]\ndir = "run"\n'
    )
    return path


def test_run_takes_options_anywhere(toml):
    options, config = parse_run(
        RunOptions, PretrainConfig, ["--parallel.tp", "2", "--config", str(toml), "--dry-run"], "pretrain"
    )
    assert options == RunOptions(toml, True)
    assert config.parallel.tp == 2 and config.train.steps == 4321


def test_run_reports_options_and_settings_together(toml):
    with pytest.raises(UserError) as caught:
        parse_run(
            RunOptions, PretrainConfig, ["--config", str(toml), "--dry-rum", "--train.steps", "x"], "pretrain"
        )
    text = str(caught.value)
    assert "--dry-rum; did you mean --dry-run?" in text and "--train.steps x" in text


def test_run_without_a_file_says_so():
    with pytest.raises(UserError, match="no --config FILE given"):
        parse_run(RunOptions, PretrainConfig, [], "pretrain")


def test_help_shows_every_field_with_its_docstring_and_the_files_values(toml, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # wider pages have columns side by side
    with pytest.raises(SystemExit):
        parse_run(
            RunOptions, PretrainConfig, ["--config", str(toml), "--parallel.tp", "7", "--help"], "pretrain"
        )
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key in fields_of(PretrainConfig):
        assert f"--{key} " in page, key
    assert "(default: 4321)" in page and "(default: 7)" in page
    assert "Optimizer steps of the whole run, counted from its beginning" in page


def test_help_without_a_file_marks_required_settings(capsys):
    with pytest.raises(SystemExit):
        parse_run(RunOptions, PretrainConfig, ["-h"], "pretrain")
    assert capsys.readouterr().out.count("(required)") == 6


def test_docstrings_are_one_line():
    docs = field_docs(Options)
    assert docs["layer_map"] == "Depth, on two lines." and set(docs) == set(fields_of(Options))


def test_no_flag_that_torchrun_would_swallow():
    """torchrun also looks behind the script's name, and refuses what abbreviates several of its own flags."""
    names = [field.flag for field in fields_of(RunOptions).values()]
    assert all(len(name) > len("--xx") for name in names)


@dataclass(frozen=True)
class FileOptions:
    src: Positional[Path]
    dst: Positional[Path]
    layer_map: str = "identity"
    dry_run: bool = False
    config: Path | None = None


def test_options_of_a_verb_may_stand_in_a_file(tmp_path):
    toml = tmp_path / "x.toml"
    toml.write_text('src = "a"\ndst = "b"\nlayer_map = "dus:8"\n')
    found = parse_options(FileOptions, ["--config", str(toml)], "move")
    assert found == FileOptions(Path("a"), Path("b"), "dus:8", False, toml)
    found = parse_options(FileOptions, ["--config", str(toml), "other", "--layer-map", "dus:2"], "move")
    assert (found.src, found.dst, found.layer_map) == (Path("other"), Path("b"), "dus:2")


def test_errors_of_options_in_a_file_come_together(tmp_path):
    toml = tmp_path / "x.toml"
    toml.write_text('src = "a"\nlayermap = "dus:8"\nconfig = "y.toml"\n')
    with pytest.raises(UserError) as error:
        parse_options(FileOptions, ["--config", str(toml)], "move")
    text = str(error.value)
    assert "unknown key layermap" in text and "did you mean layer_map?" in text
    assert "unknown key config" in text
    assert "missing dst (a path): write `dst = ...` in the file, or give the argument DST" in text
    with pytest.raises(UserError, match="no such file"):
        parse_options(FileOptions, ["--config", str(tmp_path / "none.toml")], "move")
