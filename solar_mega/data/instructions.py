"""Instruction data: rows of any known data set -> conversations, with what was left out and why.

    row ─ format ─ messages ─ checks ─ Conversation            counted all the way
            │                    │
    another kind of row     no such field, empty, mixed roles

The sets are those of the paper's Table 1 (Alpaca-GPT4, OpenOrca, Synth. Math-Instruct from MetaMathQA's
recipe) and the common shapes of others.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solar_mega.data.chat import Conversation, Message, check_conversation
from solar_mega.data.preferences import PairReport, Unusable, as_messages
from solar_mega.data.rows import DatasetSpec, Row, parse_specs, read_rows
from solar_mega.data.sources import BadRecord
from solar_mega.errors import Problems, UserError


@dataclass(frozen=True)
class InstructionFormat:
    """Which fields of a row hold what; of several names the first that the row has."""

    instruction: tuple[str, ...] = ()
    response: tuple[str, ...] = ()
    input: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    """A whole conversation, in place of instruction and response."""
    only: tuple[str, str] | None = None
    """(field, beginning of its value): rows of another kind are left out, by choice."""


FORMATS: Mapping[str, InstructionFormat] = {
    "alpaca": InstructionFormat(("instruction",), ("output",), ("input",), ("system",)),
    "openorca": InstructionFormat(("question",), ("response",), system=("system_prompt",)),
    "metamath": InstructionFormat(("query",), ("response",), only=("type", "MATH_")),
    "sharegpt": InstructionFormat(messages=("conversations", "conversation"), system=("system",)),
    "openai": InstructionFormat(messages=("messages",)),
    "plain": InstructionFormat(
        ("prompt", "instruction", "question"),
        ("response", "completion", "output", "answer"),
        ("input",),
        ("system",),
    ),
}
"""Fields as the published files have them:

- alpaca: vicgalle/alpaca-gpt4 and other files of Alpaca's shape {instruction, input, output}
- openorca: Open-Orca/OpenOrca {id, system_prompt, question, response}
- metamath: meta-math/MetaMathQA {type, query, response}; MATH_* types only, as the others were seeded with
  GSM8K, a benchmark of the paper
- sharegpt: {conversations} of {from, value}
- openai: {messages} of {role, content}
- plain: {prompt | instruction | question, response | completion | output | answer}
"""

FILTERED = "of another kind (a choice of the format)"


@dataclass
class InstructionReport(PairReport):
    """What became of the rows of one data set."""

    truncated: int = 0
    """Conversations cut at the end to fit a row, of those kept."""
    boundary: int = 0
    """Conversations in which a prompt and its answer share a token."""
    tokens: int = 0
    loss_tokens: int = 0
    """Of them in the loss."""

    @property
    def faults(self) -> int:
        """Rows that cannot be trained on; those of another kind are not meant to be."""
        return sum(count for reason, count in self.dropped.items() if reason != FILTERED)

    def describe(self) -> str:
        """A few lines for the console; of tokens only when there are any yet."""
        if not self.tokens:
            return super().describe()
        mean = self.tokens / max(self.kept, 1)
        line = (
            f"  {self.tokens:,} tokens, {self.loss_tokens:,} of them in the loss, {mean:.0f} per "
            f"conversation; {self.truncated:,} truncated; {self.boundary:,} where prompt and answer share "
            "a token"
        )
        return f"{super().describe()}\n{line}"

    def refuse_faults(self) -> None:
        """Raises UserError listing the rows that cannot be trained on, if any."""
        problems = Problems()
        for reason, count in self.dropped.items():
            if reason != FILTERED:
                problems.add(f"{count} x {reason}: {'; '.join(self.examples[reason])}")
        if self.truncated:
            problems.add(f"{self.truncated} x too long for train.seq_length")
        problems.raise_if_any(
            f"data.strict = true and {self.name} has rows that cannot be trained on as they are"
        )


@dataclass(frozen=True)
class Instruction:
    """A conversation and where it stood."""

    messages: Conversation
    where: str


def specs_of(train: Sequence[str], valid: Sequence[str]) -> tuple[list[DatasetSpec], list[DatasetSpec]]:
    """The data sets of a run. Raises UserError listing all that cannot be read as one."""
    problems = Problems()

    training = parse_specs(train, "data.train", tuple(FORMATS), problems)
    held_out = parse_specs(valid, "data.valid", tuple(FORMATS), problems)
    problems.raise_if_any("data sets")
    return training, held_out


def read_instructions(spec: DatasetSpec, seed: int) -> tuple[list[Instruction], InstructionReport]:
    """The conversations of one data set in the order of its rows; with `samples=`, that many drawn with
    `seed`, of those that can be used, holding no more than them in memory.

    Raises UserError when there is nothing to read, or no usable row.
    """
    report, kept = InstructionReport(spec.name), []
    draw, usable = random.Random(f"{seed} {spec.name}"), 0
    for row in read_rows(spec):
        report.read += 1
        if isinstance(row, BadRecord):
            report.drop(row.reason.split(" (")[0].split(":")[0], row.describe())
            continue
        try:
            instruction = Instruction(to_conversation(row, FORMATS[spec.format]), row.where())
        except Unusable as fault:
            report.drop(str(fault), row.where(), fault.detail)
            continue
        usable += 1
        if spec.samples is None or len(kept) < spec.samples:
            kept.append((usable, instruction))
        elif (at := draw.randrange(usable)) < spec.samples:
            kept[at] = (usable, instruction)
    if not kept:
        raise UserError(f"no usable row in {spec.path} read as {spec.format}\n{report.describe()}")
    report.kept, report.unused = len(kept), usable - len(kept)
    return [instruction for _, instruction in sorted(kept, key=lambda item: item[0])], report


def to_conversation(row: Row, format: InstructionFormat) -> Conversation:
    """Raises Unusable."""
    values = row.values
    if format.only is not None:
        field, beginning = format.only
        kind = values.get(field)
        if not isinstance(kind, str):
            raise Unusable(f"no field {field}", _fields(values))
        if not kind.startswith(beginning):
            raise Unusable(FILTERED, kind)
    if format.messages:
        messages = as_messages(_present(values, format.messages))
    else:
        messages = [
            Message("user", _text(values, format.instruction), _optional(values, format.input)),
            Message("assistant", _text(values, format.response)),
        ]
    system = _optional(values, format.system)
    if system.strip() and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    fault = check_conversation(messages)
    if fault is not None:
        raise Unusable(fault, " ".join(message.role for message in messages) if format.messages else "")
    return messages


def _present(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise Unusable(f"no field {' or '.join(names)}", _fields(values))


def _text(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = _present(values, names)
    if not isinstance(value, str):
        raise Unusable(f"field {' or '.join(names)} is no text", type(value).__name__)
    return value


def _optional(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = next((values[name] for name in names if values.get(name) is not None), "")
    if not isinstance(value, str):
        raise Unusable(f"field {' or '.join(names)} is no text", type(value).__name__)
    return value


def _fields(values: Mapping[str, Any]) -> str:
    return f"fields: {', '.join(map(str, values))}"[:120]
