"""Perplexity of texts of any length: every token is predicted exactly once, in overlapping windows.

    tokens 0 ... 7, context 5, stride 3      read     BOS 0 1 2 3      2 3 4 5 6
                                             score    0 1 2 3 4            5 6 7

With windows end to end (stride = context) the first tokens of each have almost nothing before them, and
perplexity comes out too high.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from solar_mega.errors import UserError
from solar_mega.evaluate.model import ShardedModel
from solar_mega.evaluate.packing import Request


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    """exp(nats per token): tokens of this model's own tokenizer."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    tokens: int
    text_bytes: int
    documents: int


def windows(tokens: Sequence[int], prefix: int, context: int, stride: int) -> Iterator[Request]:
    """Requests that score every token of a document once, each after as much as the context holds and at
    least `context - stride` tokens where there are as many. `prefix` stands before the first token."""
    if not 1 <= stride <= context:
        raise UserError(f"--stride {stride}: must be 1 to {context}, the model's context")
    first = min(context, len(tokens))
    if first:
        yield Request([prefix], list(tokens[:first]))
    at = first
    while at < len(tokens):
        stop = min(at + stride, len(tokens))
        # The last token scored is not read, so context + 1 tokens take part.
        begin = max(0, stop - context - 1)
        yield Request(list(tokens[begin:at]), list(tokens[at:stop]))
        at = stop


def text_perplexity(
    model: ShardedModel,
    documents: Sequence[tuple[Sequence[int], int]],
    prefix: int,
    stride: int | None = None,
) -> Perplexity:
    """`documents`: (token ids without special tokens, bytes of text). Rank 0 only. Default stride: half the
    context."""
    context = model.max_length
    stride = max(1, context // 2) if stride is None else stride
    requests = [r for tokens, _ in documents for r in windows(tokens, prefix, context, stride)]
    scores = model.score(requests, label="perplexity")
    nats = -math.fsum(score.total for score in scores)
    count = sum(len(tokens) for tokens, _ in documents)
    size = sum(size for _, size in documents)
    if not count:
        raise UserError("--text: the files hold no text")
    return Perplexity(math.exp(nats / count), nats / math.log(2) / size, count, size, len(documents))
