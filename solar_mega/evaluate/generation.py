"""Generating token by token over a cache of keys and values, greedily or sampled.

A batch of prompts is read once (`ShardedModel.prefill`); then each step sends one token per sequence through
the stages, and the last stage tells the others what it chose. Sampling is by Gumbel's trick with noise
seeded per sequence, so a sequence does not depend on which others it shares a batch, a rank or a layout with
(as far as the logits do not).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from solar_mega.evaluate.attention import KVCache

if TYPE_CHECKING:
    from solar_mega.evaluate.model import ShardedModel


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt."""

    max_tokens: int
    """Most tokens per sequence."""
    eos_id: int | None = None
    """Token that ends a sequence (and is not part of it); None: the tokens are never ended by one, and ids in
    `suppress` are never chosen."""
    stop: tuple[str, ...] = ()
    """Texts that end a sequence; needs `tokenizer`."""
    tokenizer: Path | None = None
    """Directory of the transformers tokenizer that `stop` is looked for with."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    seed: int = 0
    suppress: tuple[int, ...] = ()
    """Token ids that are never chosen."""
    batch_rows: int = 32
    """Sequences generated together."""
    label: str | None = None
    """Name on the progress line; None for none."""


@dataclass(frozen=True)
class Generation:
    tokens: tuple[int, ...]
    ended: bool
    """By EOS or a stop text; otherwise it ran to the limit."""


Work = tuple[Sequence[Sequence[int]], Sequence[int], Decoding]
"""Prompts that are generated together, their numbers, and how."""


class Generator:
    """Runs on every rank of a replica; all ranks of the last stage choose the same tokens."""

    def __init__(self, model: "ShardedModel") -> None:
        self.model = model
        self.tokenizer: Any = None

    def run(self, work: Work) -> list[tuple[int, Generation]]:
        """[(number, generation), ...]; complete on the last stage."""
        prompts, numbers, how = work
        if how.stop and self.tokenizer is None and self.model.last:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(str(how.tokenizer), local_files_only=True)
        capacity = max(map(len, prompts)) + how.max_tokens
        cache, hidden = self._prefill(prompts, capacity)
        texts: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        noise = [_generator(how.seed, number) for number in numbers]
        active = torch.arange(len(prompts), device=self.model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        for step in range(how.max_tokens):
            tokens = self._choose(hidden, active, noise, how)
            alive = self._take(tokens, active.tolist(), texts, ended, how)
            if step == how.max_tokens - 1 or not any(alive):
                break
            rows = torch.tensor(alive, device=self.model.device).nonzero()[:, 0]
            if len(rows) < len(active):
                active, tokens = active[rows], tokens[rows]
                _keep(cache, rows)
            positions = lengths[active] + step
            hidden = self.model.decode(cache, tokens, positions, int(positions.max()) + 1)
        return [
            (number, Generation(tuple(text), end))
            for number, text, end in zip(numbers, texts, ended, strict=True)
        ]

    def _prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Tensor | None]:
        """Equal prompts (samples of one) are read once."""
        places: dict[tuple[int, ...], int] = {}
        rows = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
        cache, hidden = self.model.prefill(list(places), capacity)
        if len(places) == len(rows):
            return cache, hidden
        repeated = torch.tensor(rows, device=self.model.device)
        _keep(cache, repeated)
        return cache, None if hidden is None else hidden[repeated]

    def _choose(
        self, hidden: Tensor | None, active: Tensor, noise: list[torch.Generator], how: Decoding
    ) -> Tensor:
        """The next token of each active sequence [r], the same on every rank of the replica."""
        tokens = torch.empty(len(active), dtype=torch.int64, device=self.model.device)
        if self.model.last:
            assert hidden is not None
            logits = self._all_logits(hidden)
            if how.suppress:
                logits[:, list(how.suppress)] = -torch.inf
            if how.temperature > 0:
                draws = [
                    torch.empty(logits.shape[1]).exponential_(generator=noise[row]) for row in active.tolist()
                ]
                # argmax(logits / T - ln Exp(1)) is a draw from softmax(logits / T).
                logits = logits / how.temperature - torch.stack(draws).to(logits.device).log()
            tokens.copy_(logits.argmax(-1))
        if dist.get_world_size(self.model.pp_group) > 1:
            source = dist.get_global_rank(self.model.pp_group, dist.get_world_size(self.model.pp_group) - 1)
            dist.broadcast(tokens, source, group=self.model.pp_group)
        return tokens

    def _all_logits(self, hidden: Tensor) -> Tensor:
        """[r, h] -> fp32 [r, V], gathered from the ranks that share the vocabulary."""
        part = self.model.logits(hidden).float().contiguous()
        shards = dist.get_world_size(self.model.tp_group)
        if shards == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(shards)]
        dist.all_gather(parts, part, group=self.model.tp_group)
        return torch.cat(parts, -1)

    def _take(
        self, tokens: Tensor, active: list[int], texts: list[list[int]], ended: list[bool], how: Decoding
    ) -> list[bool]:
        """Appends the tokens; which of the active sequences go on. The last stage, which has the tokenizer,
        decides for all."""
        for row, token in zip(active, tokens.tolist(), strict=True):
            if token == how.eos_id:
                ended[row] = True
                continue
            texts[row].append(token)
            if how.stop and self.model.last:
                text = self.tokenizer.decode(texts[row], skip_special_tokens=True)
                ended[row] = any(stop in text for stop in how.stop)
        alive = torch.tensor([not ended[row] for row in active], device=self.model.device)
        if how.stop and dist.get_world_size(self.model.pp_group) > 1:
            flags = alive.to(torch.int64)
            source = dist.get_global_rank(self.model.pp_group, dist.get_world_size(self.model.pp_group) - 1)
            dist.broadcast(flags, source, group=self.model.pp_group)
            alive = flags.bool()
        for row, goes_on in zip(active, alive.tolist(), strict=True):
            ended[row] = not goes_on
        return alive.tolist()


def _keep(cache: KVCache, rows: Tensor) -> None:
    for store in (cache.keys, cache.values):
        for layer in store:
            store[layer] = store[layer][rows]


def _generator(seed: int, number: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed((seed * 1_000_003 + number) % 2**63)
    return generator
