r"""What the model is asked when new mathematics is made from MATH. The wording is ours; the ways are those of
MetaMath (Yu et al., arXiv 2309.12284)."""

import re

NUMBER = re.compile(r"(?<![\w.,\\^_{])\d+(?:\.\d+)?(?![\w}]|,\d)")
"""Numbers in running text; not those in exponents, indices or braces, where X would make another formula."""

_REPHRASE = """Below is a mathematics problem. Say the same problem in other words: change the wording, the
order of the sentences or the story around it, but keep every number, every condition and what is asked
for, so that the solution stays exactly the same. Keep LaTeX where formulas need it. Do not solve the
problem and do not comment on it. Write the new problem only.

Problem:
{question}

The same problem in other words:"""

_SOLVE = r"""Solve the following mathematics problem. Reason step by step and give each step its reason.
Write the final answer once, at the end, inside \boxed{{}}.

Problem:
{question}

Solution:"""

_DECLARE = """Turn the following mathematics problem and its answer into statements of fact: tell all that
the problem tells, and the answer as something known, without asking anything. Keep every number as it is
written. Write the statements only.

Problem:
{question}

Answer: {answer}

Statements:"""

_FOBAR = """{question}

In the problem above a number was replaced by X. Its answer is known to be {answer}. Which number is X?"""

_VERIFY = """{statement}

In what is stated above a number was replaced by X. Which number is X?"""

_LEAD = re.compile(
    r"^(?:#+\s*)?(?:rephrased|new|same)?\s*(?:problem|question|statements?)[^:\n]{0,40}:\s*", re.IGNORECASE
)


def rephrase(question: str) -> str:
    """Asks for the question in other words."""
    return _REPHRASE.format(question=question.strip())


def solve(question: str) -> str:
    """Asks for a worked solution with a boxed answer."""
    return _SOLVE.format(question=question.strip())


def declare(question: str, answer: str) -> str:
    """Asks for question and answer as statements."""
    return _DECLARE.format(question=question.strip(), answer=answer)


def fobar(hidden: str, answer: str) -> str:
    """A question turned round: the answer is given, X is asked for."""
    return _FOBAR.format(question=hidden.strip(), answer=answer)


def verify(statement: str) -> str:
    """A statement in which X is asked for."""
    return _VERIFY.format(statement=statement.strip())


def numbers(text: str) -> set[str]:
    """The numbers that may be hidden in a text."""
    return {match[0] for match in NUMBER.finditer(text)}


def cleaned(text: str) -> str:
    """A question the model wrote, without quotes around it or a heading before it."""
    text = _LEAD.sub("", text.strip(), count=1).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text
