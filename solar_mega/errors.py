"""Errors meant for the person at the keyboard, one screen, no traceback; and what exit codes mean."""

import enum


class ExitCode(enum.IntEnum):
    """Every exit code of `solar-mega`. Anything else is a signal (137: killed) or the launcher's own
    (torchrun answers 1 for any of these; SLURM's srun passes them on)."""

    DONE = 0
    NO = 1
    """A verb's own "no" (verify found a difference), or a fault of the program, with a traceback."""
    USAGE = 2
    """The user's to mend: configuration, input, disk."""
    NOT_FINITE = 3
    """Loss or gradient not finite; nothing was updated, the last checkpoint stands."""
    OUT_OF_MEMORY = 4
    LOST_RANK = 5
    """Another rank ended; its error is the one that counts."""
    REQUEUE = 75
    """sysexits' EX_TEMPFAIL: stopped by a signal, all saved, willing to go on. Batch systems requeue it."""
    HUNG = 124
    """No progress for `train.hang_seconds`; the stacks of all ranks were written. As `timeout` answers."""
    INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, what was given, what is allowed and
    which key or flag it is about; the command line prints it without a traceback and exits with
    `exit_code`."""

    exit_code = ExitCode.USAGE


class NotFinite(UserError):
    """Loss or gradient not finite."""

    exit_code = ExitCode.NOT_FINITE


class OutOfMemory(UserError):
    """This rank's memory did not suffice."""

    exit_code = ExitCode.OUT_OF_MEMORY


class LostRank(UserError):
    """Another rank went away in the middle of a collective."""

    exit_code = ExitCode.LOST_RANK


class Problems:
    """Collects everything that is wrong, so that one run reports it all.

    >>> problems = Problems()
    >>> problems.add("parallel.tp = 3 does not divide 8 attention heads; use 1, 2, 4 or 8")
    >>> problems.raise_if_any("configs/x.toml")        # UserError listing every line added
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        self.texts.append(text)

    def raise_if_any(self, heading: str) -> None:
        if not self.texts:
            return
        noun = "problem" if len(self.texts) == 1 else "problems"
        lines = "\n".join(f"  - {text}" for text in self.texts)
        raise UserError(f"{heading}: {len(self.texts)} {noun}\n{lines}")
