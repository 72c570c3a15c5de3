"""A conversation in a terminal: what a user sees and what the keys do."""

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 120


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
            os.execvpe(sys.executable, [sys.executable, "-m", "solar_mega", *words], environment)
        self.pending = ""

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        limit = time.monotonic() + DEADLINE
        while text not in self.pending:
            assert time.monotonic() < limit, f"no {text!r} in {self.pending!r}"
            more = self._read()
            assert more is not None, f"it ended without {text!r}: {self.pending!r}"
            self.pending += more
        seen, _, self.pending = self.pending.partition(text)
        return seen + text

    def words(self) -> None:
        """Waits until something is shown, and leaves it there."""
        limit = time.monotonic() + DEADLINE
        while not self.pending.strip():
            assert time.monotonic() < limit, "nothing is shown"
            more = self._read()
            assert more is not None, "it ended"
            self.pending += more

    def interrupt(self, text: str) -> str:
        """Presses Ctrl-C until `text` is shown; what is shown up to and with it. One press may go unseen:
        Python's readline looks for signals only after a wait for keys was cut short, and a signal that comes
        between two waits cuts none short."""
        limit = time.monotonic() + DEADLINE
        while text not in self.pending:
            assert time.monotonic() < limit, f"no {text!r} in {self.pending!r}"
            self.type("\x03")
            for _ in range(3):
                more = self._read()
                assert more is not None, f"it ended without {text!r}: {self.pending!r}"
                self.pending += more
        return self.until(text)

    def settle(self) -> None:
        """Waits until nothing more is shown for two seconds, and forgets what was."""
        quiet = 0
        while quiet < 2:
            more = self._read()
            assert more is not None, "it ended"
            quiet = 0 if more else quiet + 1
        self.pending = ""

    def _read(self) -> str | None:
        if not select.select([self.descriptor], [], [], 1)[0]:
            return ""
        try:
            return os.read(self.descriptor, 4096).decode(errors="replace").replace("\r\n", "\n") or None
        except OSError:  # Linux says so when the other side is closed
            return None

    def end(self) -> int:
        """Waits for it to end; its exit code."""
        while self._read() is not None:
            pass
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(model_dir):
    opened = Terminal("chat", str(model_dir), "--template", "solar", "--max-new-tokens", "400")
    yield opened
    if opened.pid:
        try:
            os.kill(opened.pid, 9)
            os.waitpid(opened.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_session(terminal):
    banner = terminal.until("\n> ")
    assert "loading " in banner and "parameters, torch.float32, on cpu" in banner and "/system TEXT" in banner
    # The model is random and rarely stops by itself: some words appear, then the key.
    for _ in range(5):
        terminal.type("Hello\n")
        assert terminal.until("\n").endswith("Hello\n")
        terminal.words()
        terminal.type("\x03")
        answer = terminal.until("\n> ")
        assert "Traceback" not in answer
        if answer.endswith("\n(stopped)\n\n> "):
            break
        terminal.settle()  # the answer was over; the key met the prompt, or nothing at all
    else:
        pytest.fail("no answer was stopped")
    for keys, shown in (
        ("/system Be brief.\n", "(a new conversation, with this system message)"),
        ("/reset\n", "(a new conversation)"),
        ("/nonsense\n", "(/nonsense is no command)"),
        ("too long " * 300 + "\n", "(the message is "),
    ):
        terminal.type(keys)
        assert shown in terminal.until("\n> "), keys
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt("(Ctrl-D or /exit leaves)")
    terminal.until("\n> ")
    terminal.settle()  # a second press shows as a second note
    terminal.type("\x04")
    assert terminal.end() == 0


def test_exit_leaves(terminal):
    terminal.until("\n> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
