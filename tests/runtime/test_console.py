"""Progress on a terminal and in a log, rates with a clock of our own, tables and human numbers."""

import io
import math
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from solar_mega.runtime.console import Progress, Rate, human_bytes, human_count, human_seconds, say, table


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (12345, "12.3 kB"),
        (999_949, "1 MB"),
        (21.5e9, "21.5 GB"),
        (123.4e9, "123 GB"),
        (2e18, "2000 PB"),
    ],
)
def test_human_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (48, "48"),
        (0.27, "0.27"),
        (3.14159, "3.14"),
        (1000, "1K"),
        (10_731_524_096, "10.7B"),
        (3e12, "3T"),
        (-1500, "-1.5K"),
    ],
)
def test_human_count(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (275_000, "3d04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_human_seconds(value, text):
    assert human_seconds(value) == text


def test_table_aligns_words_left_and_numbers_right():
    text = table([("loss", 3.105, "1.2 GB"), ("steps", 20, "-")], ("name", "value", "size"))
    assert text.splitlines() == [
        "name   value    size",
        "-----  -----  ------",
        "loss   3.105  1.2 GB",
        "steps     20       -",
    ]
    assert table([], ("a",)) == "a\n-"
    with pytest.raises(ValueError, match="2 cells"):
        table([(1,)], ("a", "b"))


def test_rate_is_exact_at_constant_speed():
    rate = Rate(window=10)
    assert math.isnan(rate.per_second()) and rate.eta(5) == math.inf and rate.eta(0) == 0
    for second in range(100):
        rate.observe(second, 7 * second)
    assert rate.per_second() == 7
    assert rate.eta(70) == 10


def test_rate_forgets_a_slow_start():
    rate = Rate(window=10)
    rate.observe(0, 0)
    for second in range(60, 90):  # a minute of nothing, then 5 units a second
        rate.observe(second, 5 * (second - 60))
    assert rate.per_second() == pytest.approx(5)


def test_rate_spans_at_least_its_window():
    """With sparse observations the estimate still uses two of them."""
    rate = Rate(window=10)
    for second in (0, 100, 200):
        rate.observe(second, 2 * second)
    assert len(rate.points) == 2 and rate.per_second() == 2


def test_rate_at_a_standstill():
    rate = Rate()
    rate.observe(0, 3)
    rate.observe(0, 3)
    assert math.isnan(rate.per_second())
    rate.observe(10, 3)
    assert rate.eta(1) == math.inf


def test_plain_lines_every_few_seconds():
    clock, log = Clock(), io.StringIO()
    with Progress(1000, "steps", "train", stream=log, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.2
            progress.advance(10)
    lines = log.getvalue().splitlines()
    assert lines == [
        "train  250 steps / 1K steps  25%  50 steps/s  ETA 15s",
        "train  500 steps / 1K steps  50%  50 steps/s  ETA 10s",
        "train  750 steps / 1K steps  75%  50 steps/s  ETA 5.0s",
        "train  1K steps / 1K steps  100%  50 steps/s  ETA 0.0s",
        "train  1K steps in 20s  50 steps/s",
    ]


def test_work_done_before_does_not_count_in_the_rate():
    clock, log = Clock(), io.StringIO()
    with Progress(100e9, "bytes", "copy", initial=90e9, stream=log, clock=clock) as progress:
        clock.now += 5
        progress.advance(5e9)
        assert progress.line() == "copy  95 GB / 100 GB  95%  1 GB/s  ETA 5.0s"
        clock.now += 5
        progress.advance(5e9)
    assert log.getvalue().splitlines()[-1] == "copy  100 GB in 10s  1 GB/s"


def test_an_exception_says_where_it_stopped():
    clock, log = Clock(), io.StringIO()
    with (
        pytest.raises(KeyError),
        Progress(10, "files", "read", stream=log, clock=clock) as progress,
    ):
        clock.now += 2
        progress.advance(4)
        raise KeyError
    assert log.getvalue() == "read  stopped at 4 files of 10 files after 2.0s\n"


def test_nothing_to_do_is_complete():
    log = io.StringIO()
    with Progress(0, "bytes", "copy", stream=log) as progress:
        assert "100%" in progress.line() and "ETA 0.0s" in progress.line()


def test_only_rank_0_speaks(monkeypatch, capsys):
    log = io.StringIO()
    monkeypatch.setenv("RANK", "1")
    say("hello")
    with Progress(1, "steps", "x", stream=log) as progress:
        progress.advance()
    assert log.getvalue() == "" and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    say("hello")
    assert capsys.readouterr().out == "hello\n"


PROGRAM = """
    from solar_mega.runtime.console import Progress, say
    class Clock:
        now = 0.0
        def __call__(self):
            return self.now
    clock = Clock()
    with Progress(4, "files", "a label too long for this narrow terminal", clock=clock) as progress:
        for _ in range(4):
            clock.now += 1
            progress.advance()
            if progress.done == 2:
                say("half")
"""


def on_a_terminal(program: str, columns: int) -> str:
    """Everything the program writes when its stdout and stderr are a terminal of that width."""
    main, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=child, stderr=child, env=environment
    )
    os.close(child)
    chunks = []
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(main)
    assert process.wait() == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


def test_a_terminal_gets_one_line_rewritten():
    drawn = on_a_terminal(PROGRAM, 40).split("\r\x1b[K")
    assert drawn[0] == "" and drawn[-1].endswith("\n")
    frames = [text for text in drawn[1:] if "half" not in text]
    assert sum(text.count("\n") for text in frames) == 1  # only the last one stays
    assert all(len(text.rstrip("\n")) <= 39 for text in frames)  # never wraps
    assert "half\n" in drawn  # above the line, not into it


def test_a_terminal_shows_every_frame_in_order():
    text = on_a_terminal(PROGRAM, 200)
    places = [text.index(f"{share}%") for share in (25, 50, 75, 100)]
    assert places == sorted(places)
    assert text.endswith("4 files in 4.0s  1 files/s\n")
