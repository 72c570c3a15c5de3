"""Synth. Math-Instruct and Synth. Math-Alignment: new questions and answers from MATH's (paper, section 3.2).

    seed question, solution ── rephrase ──> question' ── answer ──> answer'       kept where it says the same
                                                                                  as the seed's solution
    Math-Instruct    question' -> answer'
    Math-Alignment   prompt question', chosen answer', rejected the seed's solution

Only MATH is used as seed, as in the paper, so that nothing derives from GSM8K. MetaMath (Yu et al., arXiv
2309.12284) has three more ways, here as options: another answer to the same question, and two that turn the
question round (FOBAR, self-verification): a number is hidden and asked for, the answer given.

Every completion is kept in `completions.jsonl` as soon as it is there, so that work which was
interrupted goes on.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from solar_mega.data import math_prompts as prompts
from solar_mega.data.generators import Completion, Generator, Request
from solar_mega.data.math_answers import boxed_answer, same_answer
from solar_mega.data.rows import DatasetSpec, Row, read_rows
from solar_mega.errors import UserError
from solar_mega.runtime.console import Progress
from solar_mega.runtime.files import atomic_file

Kind = Literal["rephrased", "answer_augmentation", "fobar", "self_verification"]
KINDS: tuple[Kind, ...] = get_args(Kind)

INSTRUCT, ALIGNMENT, REPORT, CACHE = (
    "instruct.jsonl",
    "alignment.jsonl",
    "report.json",
    "completions.jsonl",
)


@dataclass(frozen=True)
class Seed:
    """A problem of MATH."""

    id: str
    question: str
    solution: str
    answer: str
    """What the solution boxes."""


@dataclass(frozen=True)
class Task:
    """A question to be answered."""

    kind: Kind
    seed: Seed
    question: str
    answer: str
    """What a right answer boxes."""
    sample: int

    @property
    def id(self) -> str:
        return f"{self.seed.id}/{self.kind}/{self.sample}"


@dataclass
class Report:
    """What was asked, kept and left out, and what it cost."""

    seeds: int = 0
    requests: int = 0
    cached: int = 0
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, price_in: float, price_out: float) -> float:
        """Of all completions in the files, in the currency of the prices per million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


def read_seeds(spec: DatasetSpec, report: Report) -> list[Seed]:
    """MATH's {problem, solution}; a solution without a boxed answer is counted and left out.

    Raises UserError for data of another form (GSM8K's, say) and when nothing is left.
    """
    seeds = []
    for number, row in enumerate(read_rows(spec)):
        if not isinstance(row, Row):
            report.dropped["seed: unreadable"] += 1
            continue
        question, solution = row.values.get("problem"), row.values.get("solution")
        if not isinstance(question, str) or not isinstance(solution, str):
            raise UserError(
                f"{row.where()}: seeds are MATH's, with the fields problem and solution; this row has "
                f"{', '.join(map(str, row.values))}. Other sets are no seeds: GSM8K is one of the benchmarks"
            )
        answer = boxed_answer(solution)
        if answer is None:
            report.dropped["seed: no boxed answer"] += 1
            continue
        seeds.append(Seed(str(row.values.get("unique_id") or f"math-{number}"), question, solution, answer))
    if not seeds:
        raise UserError(f"{spec.path}: no seed with a boxed answer")
    report.seeds = len(seeds)
    return seeds


class Completions:
    """What the model said so far: a file of JSON lines, appended to at once, read again at the next start."""

    def __init__(self, file: Path, generator: Generator, report: Report) -> None:
        self.file, self.generator, self.report = file, generator, report
        self.known: dict[str, Completion] = {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        if not self.file.exists():
            return
        whole, content = 0, self.file.read_bytes()
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # the line that a killed run was writing
            whole += len(line)
            record = json.loads(line)
            request = Request(record["prompt"], record["sample"])
            tokens = record["prompt_tokens"], record["completion_tokens"]
            self.known[record["key"]] = Completion(request, record["text"], *tokens)
        if whole < len(content):
            with open(self.file, "r+b") as stream:
                stream.truncate(whole)

    def key(self, request: Request) -> str:
        text = json.dumps([self.generator.name, request.prompt, request.sample])
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, requests: Sequence[Request], label: str) -> dict[Request, Completion]:
        """All that came back, from the file or the model; failures are counted and left out."""
        missing = [request for request in dict.fromkeys(requests) if self.key(request) not in self.known]
        self.report.cached += len(requests) - len(missing)
        self.report.requests += len(requests)
        if missing:
            with (
                open(self.file, "ab", buffering=0) as stream,
                Progress(len(requests), "answers", label, initial=len(requests) - len(missing)) as progress,
            ):
                for completion in self.generator.complete(missing):
                    progress.advance()
                    if completion.error is not None:
                        self.report.dropped[f"{label}: {completion.error}"[:160]] += 1
                        continue
                    self._keep(completion, stream)
        found = {}
        for request in requests:
            completion = self.known.get(self.key(request))
            if completion is not None:
                found[request] = completion
                self.report.prompt_tokens += completion.prompt_tokens
                self.report.completion_tokens += completion.completion_tokens
        return found

    def _keep(self, completion: Completion, stream: Any) -> None:
        key = self.key(completion.request)
        record = {"key": key, **asdict(completion.request), "text": completion.text}
        record |= {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
        }
        stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.known[key] = completion


def synthesize(
    spec: DatasetSpec,
    generator: Generator,
    output: Path,
    kinds: Sequence[Kind] = ("rephrased",),
    samples: int = 1,
    seed: int = 1234,
) -> Report:
    """Writes both sets into `output`, with a report. `samples`: new questions (answers, for augmentation) of
    each kind per seed."""
    report = Report()
    seeds = read_seeds(spec, report)
    completions = Completions(output / CACHE, generator, report)
    tasks = make_tasks(seeds, kinds, samples, seed, completions, report)
    rows = answer(tasks, completions, report)
    with atomic_file(output / INSTRUCT) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(output / ALIGNMENT) as stream:
        for row in alignment(rows):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(output / REPORT) as stream:
        content = {**vars(report), "generator": generator.name, "kinds": list(kinds), "samples": samples}
        stream.write(json.dumps(content, indent=1) + "\n")
    return report


def make_tasks(
    seeds: Sequence[Seed],
    kinds: Sequence[Kind],
    samples: int,
    draw: int,
    completions: Completions,
    report: Report,
) -> list[Task]:
    """The questions to answer, those that the model has to write first included."""
    tasks: list[Task] = []
    every = [(seed, sample) for seed in seeds for sample in range(samples)]
    if "rephrased" in kinds:
        asked = {(s.id, n): Request(prompts.rephrase(s.question), n) for s, n in every}
        written = completions.of(list(asked.values()), "rephrase")
        for seed, sample in every:
            question = _question(written.get(asked[seed.id, sample]), seed, "rephrased", report)
            if question is not None:
                tasks.append(Task("rephrased", seed, question, seed.answer, sample))
    if "answer_augmentation" in kinds:
        tasks += [Task("answer_augmentation", s, s.question, s.answer, n) for s, n in every]
    if "fobar" in kinds:
        for seed, sample in every:
            hidden = hide_a_number(seed.question, f"{draw} {seed.id} {sample}")
            if hidden is None:
                report.dropped["fobar: no number to hide"] += 1
                continue
            text, number = hidden
            tasks.append(Task("fobar", seed, prompts.fobar(text, seed.answer), number, sample))
    if "self_verification" in kinds:
        tasks += _self_verification(every, draw, completions, report)
    return tasks


def _self_verification(
    every: Sequence[tuple[Seed, int]], draw: int, completions: Completions, report: Report
) -> Iterable[Task]:
    """The question and its answer as a statement, in which a number is then hidden."""
    asked = {(s.id, n): Request(prompts.declare(s.question, s.answer), n) for s, n in every}
    written = completions.of(list(asked.values()), "state")
    for seed, sample in every:
        statement = _question(written.get(asked[seed.id, sample]), seed, "self_verification", report)
        if statement is None:
            continue
        hidden = hide_a_number(statement, f"{draw} {seed.id} {sample}", only=prompts.numbers(seed.question))
        if hidden is None:
            report.dropped["self_verification: no number to hide"] += 1
            continue
        text, number = hidden
        yield Task("self_verification", seed, prompts.verify(text), number, sample)


def _question(completion: Completion | None, seed: Seed, kind: str, report: Report) -> str | None:
    if completion is None:
        return None  # counted where it failed
    text = prompts.cleaned(completion.text)
    if not text or text == seed.question.strip():
        report.dropped[f"{kind}: the question is {'as it was' if text else 'empty'}"] += 1
        return None
    return text


def hide_a_number(text: str, draw: str, only: set[str] | None = None) -> tuple[str, str] | None:
    """(`text` with one of its numbers replaced by X, that number); None where there is none of them."""
    found = [match for match in prompts.NUMBER.finditer(text) if only is None or match[0] in only]
    if not found:
        return None
    match = random.Random(draw).choice(found)
    return f"{text[: match.start()]}X{text[match.end() :]}", match[0]


def answer(tasks: Sequence[Task], completions: Completions, report: Report) -> list[dict[str, Any]]:
    """Rows of Math-Instruct: each task's answer where it is right."""
    asked = [Request(prompts.solve(task.question), task.sample) for task in tasks]
    said = completions.of(asked, "answer")
    rows = []
    for task, request in zip(tasks, asked, strict=True):
        completion = said.get(request)
        if completion is None:
            continue
        given = boxed_answer(completion.text)
        if given is None:
            report.dropped[f"{task.kind}: no boxed answer"] += 1
        elif not same_answer(task.answer, given):
            report.dropped[f"{task.kind}: another answer than the seed's"] += 1
        else:
            report.kept[task.kind] += 1
            rows.append(_row(task, completion.text.strip(), given))
    return rows


def _row(task: Task, text: str, given: str) -> dict[str, Any]:
    """{prompt, response}, and where they come from."""
    return {
        "id": task.id,
        "type": f"MATH_{task.kind}",
        "prompt": task.question,
        "response": text,
        "answer": given,
        "original_id": task.seed.id,
        "original_question": task.seed.question,
        "original_answer": task.seed.solution,
    }


def alignment(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Math-Alignment: the rephrased answer preferred to the original one (paper, section 3.2)."""
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "chosen": row["response"],
            "rejected": row["original_answer"],
            "original_id": row["original_id"],
            "source": "synth_math",
        }
        for row in rows
        if row["type"] == "MATH_rephrased"
    ]
