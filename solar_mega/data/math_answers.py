r"""Final answers of worked solutions, and whether two of them say the same.

MATH (Hendrycks et al., arXiv 2103.03874) puts the answer into the last `\boxed{}`. Spelling differs between
solutions (`\frac12`, `\dfrac{1}{2}`, `0.5`), so what is not equal as text is compared by value, with
math-verify (sympy behind a LaTeX grammar; the `math` extra).
"""

import re
import threading

from solar_mega.errors import UserError

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_SECONDS = 5
_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}")


def boxed_answer(solution: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\boxed 5`) holds; None where there is none or it is not closed."""
    found = None
    for match in _BOX.finditer(solution):
        content = _group(solution, match.end())
        if content is not None and content.strip():
            found = content.strip()
    return found


def _group(text: str, at: int) -> str | None:
    """The balanced {...} that begins at `at`, or the single word that stands there without braces."""
    if at >= len(text) or text[at] != "{":
        word = re.match(r"[^\s$.,;]+", text[at:])
        return word[0] if word else None
    depth = 0
    for i in range(at, len(text)):
        if text[i] == "\\":
            continue
        escaped = text[i - 1] == "\\"
        depth += 0 if escaped else (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[at + 1 : i]
    return None


def normalized_answer(answer: str) -> str:
    r"""Spacing, dollar signs, sizes of brackets, units of text and `\dfrac` for `\frac` taken away.

    >>> normalized_answer(r"\$\dfrac12 \text{ cm}")
    '\\frac{1}{2}'
    """
    text = answer.strip().strip("$").replace("\\$", "").replace("\\!", "").replace("\\%", "").replace("%", "")
    text = re.sub(r"\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\s*\{?\\circ\}?", "", text)
    bare = _WRAPPED.sub(r"\1", text)
    words = _WRAPPED.sub("", text)
    text = words if words.strip() else bare  # "5 \text{ cm}" is 5, "\text{even}" is even
    text = re.sub(r"\\[ ,;:]|~", " ", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    return re.sub(r"^[A-Za-z]=(?=.)", "", text)


def same_answer(first: str, second: str) -> bool:
    """Equal as text after normalising, or in value. Raises UserError where the value would need math-verify
    and it is not installed."""
    a, b = normalized_answer(first), normalized_answer(second)
    if a == b:
        return True
    parse, verify = _library()
    # Towers of powers can keep sympy busy for ever. The limit is an alarm, which only a main thread has.
    limit = _SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        gold, other = (parse(f"${text}$", parsing_timeout=limit) for text in (a, b))
        return bool(gold and other and verify(gold, other, timeout_seconds=limit))
    except (ValueError, TypeError, RecursionError, OverflowError):
        return False


def require_library() -> None:
    """Raises UserError when math-verify is not installed, before work that will need it."""
    _library()


def _library():
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(
            "comparing answers needs the package math-verify: pip install 'solar-mega[math]'"
        ) from None
    return parse, verify
