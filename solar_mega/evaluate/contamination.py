"""Was a model trained on a benchmark? Neighbours test and Min-K% Prob (paper, appendix C).

    1. The end of every benchmark text (40% of its tokens) is written anew, several times, by a reference
       model that continues the beginning: neighbours, as long as the original in tokens.
    2. The target model's loss on the original end is compared with its losses on the neighbours'.
       r = share of neighbours that it finds likelier than the original
    3. A text counts as known when r < 0.1. The data set's result is the share of known texts: about 0.1 by
       chance when the target writes like the reference, near 1 when the texts were learned. The tool the
       paper used calls 0.85 and more very likely contaminated.

Beside it Min-K% Prob (Shi et al., arXiv 2310.16789): the mean log-probability of the k% least likely tokens
of a text; learned texts have no unlikely tokens. It is comparable between models, not between data sets, so
the reference's stands next to it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.evaluate.generation import Decoding
from solar_mega.evaluate.model import Score, ShardedModel
from solar_mega.evaluate.packing import Request
from solar_mega.evaluate.task_files import layout_of, records

SHORTEST = 10
"""Tokens of the shortest text that is tested."""

_GROUP = 8  # texts whose neighbours are generated together
_SURPLUS = 1.5  # tokens generated per token wanted, where the tokenizers differ


@dataclass(frozen=True)
class TestPlan:
    neighbours: int
    rewritten: float
    """Share of a text's tokens that neighbours replace."""
    threshold: float
    min_k: float
    """Share of the least likely tokens in Min-K% Prob."""
    temperature: float
    max_tokens: int
    """Longer texts are cut."""
    seed: int


@dataclass
class Text:
    """A benchmark text in the target's tokens."""

    dataset: str
    tokens: list[int]
    kept: int
    """Tokens of the beginning that neighbours share."""
    neighbours: list[list[int]]
    """Their ends, each as long as the original's."""


@dataclass(frozen=True)
class DatasetResult:
    dataset: str
    texts: int
    share: float
    """Of texts with r below the threshold: the test's result."""
    mean_r: float
    min_k_target: float
    """Mean over texts, nats."""
    min_k_reference: float
    too_short: int
    r: tuple[float, ...]
    """Of every text."""


def render(task: str, record: dict[str, Any]) -> str:
    """A record of one of the six tasks as the text it would be in a training set: question and right
    answer."""
    if task == "arc_challenge":
        choices = record["choices"]
        return (
            f"Question: {record['question']}\n"
            f"Answer: {choices['text'][choices['label'].index(record['answerKey'])]}"
        )
    if task == "hellaswag":
        context = f"{record['ctx_a']} {record['ctx_b']}".strip()
        return f"{context} {record['endings'][int(record['label'])]}"
    if task.startswith("mmlu"):
        listed = "\n".join(
            f"{'ABCDEFGH'[number]}. {choice}" for number, choice in enumerate(record["choices"])
        )
        answer = record["answer"]
        return f"{record['question']}\n{listed}\nAnswer: {'ABCDEFGH'[answer]}. {record['choices'][answer]}"
    if task == "truthfulqa_mc2":
        targets = record["mc1_targets"]
        return f"Q: {record['question']}\nA: {targets['choices'][targets['labels'].index(1)]}"
    if task == "winogrande":
        return record["sentence"].replace("_", record[f"option{record['answer']}"])
    return f"Question: {record['question']}\nAnswer: {record['answer']}"


def read_texts(task: str, files: Sequence[Path], limit: int) -> list[str]:
    """The first `limit` test records of a task, rendered. The files are checked before."""
    assert layout_of(task) is not None
    found: list[str] = []
    for path in files:
        for _, record in records(path):
            if len(found) < limit:
                found.append(render(task, record))
    return found


def prepare_texts(
    dataset: str, texts: Sequence[str], tokenizer: Any, plan: TestPlan
) -> tuple[list[Text], int]:
    """(texts in tokens, how many were too short)."""
    prepared = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)[: plan.max_tokens]
        if len(tokens) < SHORTEST:
            continue
        kept = max(1, len(tokens) - math.ceil(plan.rewritten * len(tokens)))
        prepared.append(Text(dataset, tokens, kept, []))
    return prepared, len(texts) - len(prepared)


def write_neighbours(
    reference: ShardedModel,
    texts: Sequence[Text],
    target_tokenizer: Any,
    reference_tokenizer: Any,
    plan: TestPlan,
) -> None:
    """Fills `neighbours` by sampling from the reference. The same seed gives the same neighbours.

    With another tokenizer the beginning goes over as text, more is generated than needed, and what comes back
    is cut to the original's number of target tokens; neighbours that stay shorter are left out."""
    same = target_tokenizer.get_vocab() == reference_tokenizer.get_vocab()
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number].tokens))
    bos = _prefix(reference_tokenizer)
    for at in range(0, len(order), _GROUP):
        group = [texts[number] for number in order[at : at + _GROUP]]
        starts = [
            text.tokens[: text.kept] if same else _translate(text, target_tokenizer, reference_tokenizer)
            for text in group
        ]
        longest = max(len(text.tokens) - text.kept for text in group)
        decoding = Decoding(
            max_tokens=longest if same else math.ceil(_SURPLUS * longest) + 4,
            temperature=plan.temperature,
            seed=plan.seed * 100_003 + at,
            suppress=tuple(reference_tokenizer.all_special_ids),
            batch_rows=64,
            label=f"neighbours {at + len(group)}/{len(order)}" if at % (8 * _GROUP) == 0 else None,
        )
        prompts = [[*bos, *start] for start in starts for _ in range(plan.neighbours)]
        answers = reference.generate(prompts, decoding)
        for number, text in enumerate(group):
            wanted = len(text.tokens) - text.kept
            for answer in answers[number * plan.neighbours : (number + 1) * plan.neighbours]:
                end = list(answer.tokens)
                if not same:
                    whole = reference_tokenizer.decode([*starts[number], *end], skip_special_tokens=True)
                    end = target_tokenizer.encode(whole, add_special_tokens=False)[text.kept :]
                if len(end) >= wanted:
                    text.neighbours.append(end[:wanted])


def _translate(text: Text, source: Any, target: Any) -> list[int]:
    return target.encode(source.decode(text.tokens[: text.kept]), add_special_tokens=False)


def _prefix(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [tokenizer.eos_token_id if bos is None else bos]


def likelier_shares(target: ShardedModel, texts: Sequence[Text], tokenizer: Any) -> list[float]:
    """r of every text; nan where it has no neighbours."""
    requests = []
    for text in texts:
        context = [*_prefix(tokenizer), *text.tokens[: text.kept]]
        requests += [Request(context, end) for end in (text.tokens[text.kept :], *text.neighbours)]
    scores = iter(target.score(requests, label="losses"))
    shares = []
    for text in texts:
        original, *others = (next(scores).total for _ in range(1 + len(text.neighbours)))
        # All ends are equally long: comparing sums is comparing losses per token.
        shares.append(sum(other > original for other in others) / len(others) if others else math.nan)
    return shares


def min_k_probs(
    model: ShardedModel, texts: Sequence[Sequence[int]], tokenizer: Any, share: float
) -> list[float]:
    """Min-K% Prob of every text (token ids of `model`), in nats."""
    requests = [Request(_prefix(tokenizer), tokens) for tokens in texts]
    return [min_k(score, share) for score in model.score(requests, label="Min-K% Prob")]


def min_k(score: Score, share: float) -> float:
    lowest = sorted(score.logps)[: max(1, round(share * len(score.logps)))]
    return statistics.fmean(lowest)


def summarise(
    dataset: str,
    r: Sequence[float],
    target: Sequence[float],
    reference: Sequence[float],
    too_short: int,
    threshold: float,
) -> DatasetResult:
    known = [value for value in r if not math.isnan(value)]
    return DatasetResult(
        dataset=dataset,
        texts=len(known),
        share=sum(value < threshold for value in known) / len(known) if known else math.nan,
        mean_r=statistics.fmean(known) if known else math.nan,
        min_k_target=statistics.fmean(target) if target else math.nan,
        min_k_reference=statistics.fmean(reference) if reference else math.nan,
        too_short=too_short + len(r) - len(known),
        r=tuple(r),
    )
