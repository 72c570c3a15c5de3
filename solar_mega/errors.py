"""Errors meant for the person at the keyboard: one screen, no traceback."""


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, what was given, what is allowed and
    which key or flag it is about; the command line prints it without a traceback and exits with 2."""


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
