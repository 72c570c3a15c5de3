"""Preference pairs: rows of any known data set -> (prompt, chosen, rejected), prepared as Zephyr does.

    row ─ format ─ prompt messages, two responses ─ checks ─ filters ─ Pair          counted all the way
                                                     │         │
              no such field, empty, mixed roles, same response  excluded source or prompt

Zephyr (Tunstall et al., arXiv 2310.16944; huggingface/alignment-handbook): the prompt is everything but the
last turn, and a conversation without system message gets an empty one. The paper prepares its pairs that way
(SOLAR 10.7B, section 4.1), from the sets of its Table 1.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solar_mega.data.chat import Conversation, Message
from solar_mega.data.rows import DatasetSpec, Row, read_rows
from solar_mega.data.sources import BadRecord
from solar_mega.errors import Problems, UserError

_EXAMPLES = 3


@dataclass(frozen=True)
class Pair:
    """One preference: of two responses to a conversation that ends with the user, `chosen` is preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    id: str
    """The data set's own id, or file and line."""
    source: str
    """Where the data set says the prompt comes from; "" where it does not."""


@dataclass(frozen=True)
class PairFormat:
    """Which fields of a row hold what; of several names the first that the row has."""

    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    prompt: tuple[str, ...] = ()
    """Text of the user, or messages; without, chosen and rejected are whole conversations."""
    system: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    source: tuple[str, ...] = ("source",)
    scores: tuple[str, str] | None = None
    """Fields whose equality makes the pair a tie."""


FORMATS: Mapping[str, PairFormat] = {
    "plain": PairFormat(
        ("chosen",), ("rejected",), ("prompt", "question", "instruction"), ("system",), ("id", "prompt_id")
    ),
    "orca_dpo_pairs": PairFormat(
        ("chosen", "chatgpt"), ("rejected", "llama2-13b-chat"), ("question",), ("system",), ("id",)
    ),
    "ultrafeedback_allenai": PairFormat(
        ("chosen",), ("rejected",), id=("prompt_id",), scores=("score_chosen", "score_rejected")
    ),
    "ultrafeedback_argilla": PairFormat(
        ("chosen",), ("rejected",), ("prompt",), scores=("chosen-rating", "rejected-rating")
    ),
    "sharegpt": PairFormat(("chosen",), ("rejected",), ("conversations",), ("system",), ("id",)),
    "openai": PairFormat(
        ("chosen", "preferred_output"),
        ("rejected", "non_preferred_output"),
        ("prompt", "input", "messages"),
        (),
        ("id",),
    ),
}
"""Fields as the published files have them:

- plain: {prompt, chosen, rejected}, texts
- orca_dpo_pairs: Intel/orca_dpo_pairs, both revisions (chosen/rejected, chatgpt/llama2-13b-chat)
- ultrafeedback_allenai: allenai/ultrafeedback_binarized_cleaned, whole conversations
- ultrafeedback_argilla: argilla/ultrafeedback-binarized-preferences-cleaned, texts or conversations
- sharegpt: {conversations, chosen, rejected} of {from, value}
- openai: {prompt | messages, chosen, rejected} of {role, content}, or OpenAI's own {input, preferred_output,
  non_preferred_output}
"""

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


class Unusable(Exception):
    """A row that is no pair; the message is the reason it is counted under, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass(frozen=True)
class PairOptions:
    """How rows become pairs."""

    insert_system: bool = True
    """Give conversations without system message an empty one, as the alignment handbook does."""
    exclude_sources: tuple[str, ...] = ()
    """Sources (the data set's own names) whose pairs are left out."""
    exclude_prompts: frozenset[str] = frozenset()
    """Prompts left out, as `normalized` gives them."""
    drop_ties: bool = False
    """Leave out pairs whose responses were scored alike."""
    strict: bool = False
    """Unusable rows are an error that lists them."""
    seed: int = 1234
    """Chooses the rows where a data set is subsampled."""


@dataclass
class PairReport:
    """What became of the rows of one data set."""

    name: str
    read: int = 0
    kept: int = 0
    ties: int = 0
    """Pairs scored alike, kept or not."""
    unused: int = 0
    """Usable pairs beyond `samples`."""
    dropped: Counter = field(default_factory=Counter)
    """Reason -> rows."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first few places."""

    def drop(self, reason: str, where: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(f"{where}: {detail}" if detail else where)

    @property
    def faults(self) -> int:
        """Rows that are no pairs, those left out by choice not counted."""
        return sum(count for reason, count in self.dropped.items() if reason not in FILTERS)

    def describe(self) -> str:
        """A few lines for the console."""
        beyond = f", {self.unused:,} left out by samples=" if self.unused else ""
        ties = f", {self.ties:,} of them ties" if self.ties else ""
        lines = [f"{self.name}: {self.kept:,} of {self.read:,} rows{beyond}{ties}"]
        for reason, count in self.dropped.most_common():
            lines.append(f"  {count:,} dropped: {reason} ({'; '.join(self.examples[reason])})")
        return "\n".join(lines)


FILTERS = ("excluded source", "excluded prompt", "tie")
"""Reasons that are choices, not faults: strict mode passes over them."""


def read_pairs(spec: DatasetSpec, options: PairOptions) -> tuple[list[Pair], PairReport]:
    """The pairs of one data set in the order of its rows, and what was left out and why.

    Raises UserError when nothing is left, and in strict mode for every row that cannot be used.
    """
    report, pairs = PairReport(spec.name), []
    for row in read_rows(spec):
        report.read += 1
        if isinstance(row, BadRecord):
            report.drop("unreadable", row.describe())
            continue
        try:
            pair, tie = to_pair(row, FORMATS[spec.format], options)
        except Unusable as fault:
            report.drop(str(fault), row.where(), fault.detail)
            continue
        report.ties += tie
        pairs.append(pair)
    if options.strict:
        _refuse_faults(report)
    if spec.samples is not None and len(pairs) > spec.samples:
        chosen = random.Random(f"{options.seed} {spec.name}").sample(range(len(pairs)), spec.samples)
        report.unused = len(pairs) - spec.samples
        pairs = [pairs[i] for i in sorted(chosen)]
    report.kept = len(pairs)
    if not pairs:
        raise UserError(f"no usable pair in {spec.path} read as {spec.format}\n{report.describe()}")
    return pairs, report


def _refuse_faults(report: PairReport) -> None:
    problems = Problems()
    for reason, count in report.dropped.items():
        if reason not in FILTERS:
            problems.add(f"{count} x {reason}: {'; '.join(report.examples[reason])}")
    problems.raise_if_any(f"data.strict = true and {report.name} has rows that are no pairs")


def to_pair(row: Row, format: PairFormat, options: PairOptions) -> tuple[Pair, bool]:
    """(pair, whether it is a tie). Raises Unusable."""
    values = row.values
    prompt, chosen = _conversation(values, format, format.chosen)
    other_prompt, rejected = _conversation(values, format, format.rejected)
    if prompt != other_prompt:
        raise Unusable("chosen and rejected answer different prompts")
    _check_roles(prompt)
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty response", "chosen" if not chosen.strip() else "rejected")
    if not prompt[-1].content.strip():
        raise Unusable("empty prompt")
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen and rejected are the same")
    source = str(_first(values, format.source) or "")
    if source in options.exclude_sources:
        raise Unusable("excluded source", source)
    if options.exclude_prompts and any(
        normalized(message.content) in options.exclude_prompts for message in prompt if message.role == "user"
    ):
        raise Unusable("excluded prompt")
    tie = format.scores is not None and _tied(values, format.scores)
    if tie and options.drop_ties:
        raise Unusable("tie")
    if options.insert_system and prompt[0].role != "system":
        prompt = [Message("system", ""), *prompt]
    id = _first(values, format.id)
    return Pair(tuple(prompt), chosen, rejected, row.where() if id is None else str(id), source), tie


def _conversation(
    values: Mapping[str, Any], format: PairFormat, response: tuple[str, ...]
) -> tuple[Conversation, str]:
    """The prompt and the last turn of what `response` names."""
    answer = _required(values, response)
    prompt: Conversation = []
    if format.prompt:
        given = _required(values, format.prompt)
        if isinstance(given, Mapping) and "messages" in given:
            given = given["messages"]
        prompt = [Message("user", given)] if isinstance(given, str) else as_messages(given)
    if isinstance(answer, str):
        text = answer
    else:
        turns = as_messages(answer)
        if not turns or turns[-1].role != "assistant":
            raise Unusable("mixed roles", f"{response[0]} does not end with the assistant")
        text = turns[-1].content
        # A response of several turns repeats the conversation, and then knows more of it than `prompt`.
        prompt = turns[:-1] or prompt
    system = _first(values, format.system)
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0].role != "system"):
        prompt = [Message("system", system), *prompt]
    return prompt, text


def as_messages(value: Any) -> Conversation:
    """{role, content} or {from, value}, one or a list of them. Raises Unusable."""
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise Unusable("not messages", type(value).__name__)
    messages = []
    for item in items:
        if not isinstance(item, Mapping):
            raise Unusable("not messages", f"list of {type(item).__name__}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role not in _ROLES:
            raise Unusable("unknown role", repr(role))
        if not isinstance(content, str):
            raise Unusable("message without text", f"content is {type(content).__name__}")
        messages.append(Message(_ROLES[role], content))  # type: ignore[arg-type]
    return messages


def _check_roles(prompt: Conversation) -> None:
    """[system] user (assistant user)*"""
    turns = [message.role for message in prompt]
    if turns[:1] == ["system"]:
        del turns[0]
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if len(turns) % 2 == 0 or turns != expected:
        raise Unusable("mixed roles", " ".join(turns) or "no turns")


def _required(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    value = _first(values, names)
    if value is None:
        raise Unusable(f"no field {' or '.join(names)}", f"fields: {', '.join(map(str, values))}"[:120])
    return value


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _tied(values: Mapping[str, Any], scores: tuple[str, str]) -> bool:
    first, second = (values.get(name) for name in scores)
    return first is not None and first == second


def normalized(text: str) -> str:
    """Case, spacing and punctuation taken away, for exact-match exclusion."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_prompts(files: Sequence[Path]) -> frozenset[str]:
    """Prompts to exclude, normalised: a text file's lines, or `prompt` or `question` of JSON lines.

    Raises UserError for a file that is missing or a JSON line with neither field.
    """
    problems, prompts = Problems(), set()
    for file in files:
        if not file.is_file():
            problems.add(f"data.exclude_prompts: {file}: no such file")
            continue
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            text = line if file.suffix == ".txt" else _prompt_of(line)
            if text is None:
                problems.add(f"{file}:{number}: no JSON object with prompt or question")
                break
            prompts.add(normalized(text))
    problems.raise_if_any("prompts to exclude")
    return frozenset(prompts - {""})


def _prompt_of(line: str) -> str | None:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    text = record.get("prompt", record.get("question")) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None
