"""TOML and overrides into dataclasses and back; every mistake reported, all at once, by key."""

import dataclasses
import string
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.config.fields import fields_of
from solar_mega.config.load import load_config, to_toml
from solar_mega.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    PretrainConfig,
    TrainConfig,
)
from solar_mega.errors import UserError

GOOD = """
[model]
path = "base"
[train]
steps = 100
seq_length = 128
global_batch_size = 8
[data]
train = ["0.7 a/text", "0.3 b/code"]
[output]
dir = "run"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return path

    return write


def problems(write, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without heading."""
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, write(text), overrides)
    heading, *lines = str(caught.value).splitlines()
    assert f"{len(lines)} problem" in heading
    return [line.removeprefix("  - ") for line in lines]


def test_file_over_defaults_and_flags_over_file(write):
    path = write(GOOD + "[parallel]\ntp = 4\n[optimizer]\nlr = 1\n")
    config = load_config(
        PretrainConfig, path, ["--parallel.tp", "2", "--parallel.pp=3", "--train.steps", "7"]
    )
    assert (config.parallel.tp, config.parallel.pp, config.parallel.vpp) == (2, 3, 1)
    assert config.train.steps == 7 and config.train.seq_length == 128
    assert config.model.path == Path("base") and config.data.train == ("0.7 a/text", "0.3 b/code")
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.schedule == PretrainConfig.__dataclass_fields__["schedule"].default_factory()


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["--parallel.sequence_parallel=False"], "parallel.sequence_parallel", False),
        (["--parallel.sequence-parallel", "true"], "parallel.sequence_parallel", True),
        (["--parallel.sequence_parallel"], "parallel.sequence_parallel", True),
        (["--parallel.sequence_parallel", "--train.seed", "5"], "parallel.sequence_parallel", True),
        (["--parallel.dp", "2", "--parallel.dp", "4"], "parallel.dp", 4),
        (["--parallel.dp", "None"], "parallel.dp", None),
        (["--data.train", "a", "0.5 b"], "data.train", ("a", "0.5 b")),
        (["--data.train=a"], "data.train", ("a",)),
        (["--data.valid", "--train.seed", "5"], "data.valid", ()),
        (["--data.split", "0.9", ".1"], "data.split", (0.9, 0.1)),
        (["--optimizer.lr", "3e-5"], "optimizer.lr", 3e-5),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--train.steps", "1_000"], "train.steps", 1000),
        (["--train.precision=fp32"], "train.precision", "fp32"),
        (["--output.dir", "--odd"], "output.dir", None),  # a value that looks like a flag needs `=`
        (["--output.dir=--odd"], "output.dir", Path("--odd")),
        (["--output.dir=a=b"], "output.dir", Path("a=b")),
        (["--train.seed=-1"], "train.seed", -1),
        (["--train.seed", "-1"], "train.seed", -1),
    ],
)
def test_overrides(write, words, key, expected):
    if key == "output.dir" and expected is None:
        assert "--output.dir (nothing): must be a path" in problems(write, GOOD, *words)
        return
    config = load_config(PretrainConfig, write(GOOD), words)
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == expected


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[parallel]\ntpp = 2", "unknown key parallel.tpp = 2; did you mean parallel.tp?"),
        ("[parallel]\nlr = 2", "unknown key parallel.lr = 2; did you mean optimizer.lr?"),
        ("[parallel]\nsequence-parallel = true", "did you mean parallel.sequence_parallel?"),
        ("[paralel]\ntp = 2", "unknown table [paralel]; did you mean parallel?"),
        ("[zebra]\ntp = 2", "unknown table [zebra]; known are checkpoint, data, kernels"),
        ("[parallel]\ntp = '2'", 'parallel.tp = "2": must be a whole number'),
        ("[parallel]\ntp = 2.0", "parallel.tp = 2.0: must be a whole number; write 2"),
        ("[parallel]\ntp = true", "parallel.tp = true: must be a whole number"),
        ("[parallel]\nsequence_parallel = 1", "parallel.sequence_parallel = 1: must be true or false"),
        ("[optimizer]\nlr = '1e-3'", 'optimizer.lr = "1e-3": must be a number'),
        ("[optimizer]\nlr = false", "optimizer.lr = false: must be a number"),
        ("[schedule]\nkind = 'linear'", 'schedule.kind = "linear": must be one of cosine, wsd, constant'),
        ("[checkpoint.keep]\nlast = 2", "checkpoint.keep = {...}: must be a whole number"),
        ("[kernels]\nrms_norm = ['fused']", "must be one of fused, reference"),
    ],
)
def test_mistakes_in_the_file_are_named(write, line, complaint):
    [text] = problems(write, f"{GOOD}\n{line}\n")
    assert complaint in text


def test_values_in_place_of_tables_and_lists(write):
    lines = problems(write, 'parallel = 3\n[data]\ntrain = "a"\nsplit = [0.5]\n')
    assert "parallel = 3: must be a table; write `[parallel]` and its keys below" in lines
    assert 'data.train = "a": must be a list of strings' in lines
    assert "data.split = [0.5]: must be a list of 2 numbers" in lines


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--tp", "2"], "unknown flag --tp; did you mean --parallel.tp?"),
        (["--parallel.tq", "2"], "unknown flag --parallel.tq; did you mean --parallel.tp?"),
        (["--parallel.tp", "two"], "--parallel.tp two: must be a whole number"),
        (["--parallel.tp"], "--parallel.tp (nothing): must be a whole number"),
        (["--train.steps", "1e3"], "--train.steps 1e3: must be a whole number; write 1000"),
        (["--data.split", "0.9"], "--data.split 0.9: must be a list of 2 numbers"),
        (["--train.recompute", "some"], "must be one of none, selective, full"),
        (["--parallel.sequence_parallel=maybe"], "must be true or false"),
        (["stray"], "unexpected argument 'stray'"),
        (["--parallel.t", "2"], "unknown flag --parallel.t"),  # names are never abbreviated
        (["-n", "2"], "unknown flag -n"),
    ],
)
def test_mistakes_on_the_command_line_are_named(write, words, complaint):
    [text] = problems(write, GOOD, *words)
    assert complaint in text


def test_everything_is_reported_at_once(write):
    lines = problems(write, "[model]\npth = 'x'\n[train]\nsteps = 'x'\n", "--tp", "2", "--train.seed", "x")
    text = "\n".join(lines)
    for expected in ("model.pth", "train.steps", "--tp", "--train.seed x"):
        assert expected in text
    for key in ("model.path", "train.seq_length", "train.global_batch_size", "data.train", "output.dir"):
        assert f"missing {key} (" in text
    assert "missing train.steps" not in text  # it is wrong, not missing
    assert len(lines) == 9


def test_missing_keys_say_where_to_put_them(write):
    lines = problems(write, GOOD.replace("steps = 100", ""))
    assert lines == [
        "missing train.steps (a whole number): write `[train] steps = ...` in the file, or give --train.steps"
    ]


def test_unreadable_files(tmp_path):
    (tmp_path / "tiny.toml").write_text("a = = 1")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    for name, expected in (
        ("tinny.toml", f"no such file (looked from {Path.cwd()}); did you mean {tmp_path}/tiny.toml?"),
        ("tiny.toml", "not valid TOML"),
        ("latin.toml", "not UTF-8 text (byte 5)"),
        ("", "cannot be read: Is a directory"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(PretrainConfig, tmp_path / name)
        assert expected in str(caught.value) and "--config" in str(caught.value)


# Round trip. Any text a TOML file can hold: everything but surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
paths = st.text(string.ascii_letters + string.digits + ' ./_-"\\é', min_size=1, max_size=20).map(Path)
counts = st.integers(min_value=-(2**63), max_value=2**63 - 1)
numbers = st.floats(allow_nan=False)

configs = st.builds(
    PretrainConfig,
    model=st.builds(ModelConfig, path=paths, layer_map=texts, init_std=st.none() | numbers),
    train=st.builds(TrainConfig, steps=counts, seq_length=counts, global_batch_size=counts, threads=counts),
    data=st.builds(
        DataConfig,
        train=st.lists(texts).map(tuple),
        split=st.tuples(numbers, numbers),
        cache=st.none() | paths,
    ),
    output=st.builds(OutputConfig, dir=paths, export_precision=st.sampled_from([None, "fp32", "bf16"])),
    parallel=st.builds(ParallelConfig, dp=st.none() | counts, sequence_parallel=st.booleans()),
    checkpoint=st.builds(CheckpointConfig, resume=st.sampled_from(["auto", "never", "must"])),
)


@given(configs)
def test_to_toml_reads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("round") / "x.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(PretrainConfig, path) == config


def test_every_schema_can_be_written_back():
    """to_toml leaves None out, so None must be the default wherever it is possible."""
    for field in fields_of(PretrainConfig).values():
        if type(None) in typing.get_args(field.type):
            assert field.default is None, field.key


def test_literals_that_are_not_strings(write):
    @dataclass(frozen=True)
    class Small:
        bits: Literal[4, 8] = 8
        names: tuple[int, ...] = dataclasses.field(default=())

    assert load_config(Small, write("bits = 4\nnames = [1, 2]")) == Small(4, (1, 2))
    assert load_config(Small, None, ["--bits", "4", "--names", "3"]) == Small(4, (3,))
    with pytest.raises(UserError, match="one of 4, 8"):
        load_config(Small, write("bits = 4.0"))
