"""A model for reading: the decoder of a directory or checkpoint on TP x PP x DP, scoring and generating.

Rank 0 asks, the others serve:

    with opened(path, ParallelConfig(tp=2)) as model:       # on every rank
        if model.leads:
            model.score([Request(context, continuation), ...])
                                                            # other ranks are back here when rank 0 leaves

Each question is broadcast; batches are dealt to the data-parallel replicas; within a replica hidden states
go from stage to stage, so that stage 0 works on the next batch while stage 1 works on this one. (Megatron's
own forward schedule wants equal shapes; here every batch has its own.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.from_hf import check_source, load_weights
from solar_mega.checkpoint.source import Source, open_source
from solar_mega.config.schema import ParallelConfig, Precision
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.evaluate.attention import DecodePlan, KVCache, Plan, PlannedAttention, RowPlan
from solar_mega.evaluate.generation import Decoding, Generation, Generator
from solar_mega.evaluate.packing import Batch, Request, make_batches, prompt_batch
from solar_mega.model.architecture import Architecture
from solar_mega.model.attention import window_of
from solar_mega.model.builder import build_model
from solar_mega.model.layout import check_layout
from solar_mega.ops.token_logprob import token_logprob_with_metrics
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import Progress

BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens in a batch: enough to fill the device's matrix products."""

_LOGITS_BYTES = 64 * 2**20  # of one piece of the logits


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    logps: tuple[float, ...]
    """ln p of each token."""
    greedy: bool
    """Whether each token is the most probable one."""

    @property
    def total(self) -> float:
        return sum(self.logps)


def prepare(path: Path, parallel: ParallelConfig, key: str = "DIR") -> tuple[Source, Architecture]:
    """What is there and whether it fits, read without starting anything. Raises UserError."""
    source = open_source(path, key)
    arch = Architecture.from_hf(source.config, f"{source.path}/config.json")
    check_layout(arch, parallel).raise_if_any(f"{path}: the model does not fit --tp and --pp")
    if source.kind == "hf":
        check_source(HFDirectory(source.path).tensors, arch, str(source.path))
    return source, arch


@contextmanager
def opened(path: Path, parallel: ParallelConfig, precision: Precision | None = None):
    """The model at `path` on all ranks; groups must exist (`runtime.parallel.running`). Rank 0 runs the
    block; the others answer it and leave with it. Raises UserError for what `prepare` refuses."""
    with ranks.together():
        source, arch = prepare(path, parallel)
    model = ShardedModel(source, arch, parallel, precision or source.precision)
    if not model.leads:
        model.serve()
        yield model
        return
    try:
        yield model
    finally:
        model.dismiss()


class ShardedModel:
    """This rank's part of a decoder, in evaluation mode."""

    def __init__(
        self, source: Source, arch: Architecture, parallel: ParallelConfig, precision: Precision
    ) -> None:
        from megatron.core import parallel_state as mpu

        self.source, self.arch = source, arch
        self.max_length = arch.max_position_embeddings
        self.device = ranks.device()
        (self.chunk,) = build_model(arch, parallel, precision)
        _load(self.chunk, source, arch, parallel)
        self.chunk.eval().requires_grad_(False)
        self.first = mpu.is_pipeline_first_stage(ignore_virtual=True)
        self.last = mpu.is_pipeline_last_stage(ignore_virtual=True)
        self.pp_group = mpu.get_pipeline_model_parallel_group()
        self.tp_group = mpu.get_tensor_model_parallel_group()
        self.tp_rank = mpu.get_tensor_model_parallel_rank()
        self.replica, self.replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        self.leads = ranks.is_main()
        self.attentions = _plan_attention(self.chunk)
        if self.last:
            tied = self.chunk.share_embeddings_and_output_weights
            head = self.chunk.shared_embedding_or_output_weight() if tied else self.chunk.output_layer.weight
            self.head_weight = head.detach()
            self.chunk.post_process = False  # hidden states come out; the head reads the rows it needs

    # ------------------------------------------------------------------------------- questions of rank 0

    def score(
        self, requests: Sequence[Request], batch_tokens: int | None = None, label: str | None = None
    ) -> list[Score]:
        """Log-probabilities of every request's continuation, in order. Rank 0 only. Raises ValueError for an
        empty context or continuation."""
        if not requests:
            return []
        limit = batch_tokens or BATCH_TOKENS[self.device.type]
        batches = make_batches(requests, self.max_length, limit)
        answers: list[Score | None] = [None] * len(requests)
        for part in self._ask("score", batches, label):
            for number, score in part:
                answers[number] = score
        assert all(answer is not None for answer in answers)
        return answers  # type: ignore[return-value]

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Generation]:
        """Continues every prompt as `decoding` says. Rank 0 only. Raises UserError when a prompt and
        `decoding.max_tokens` do not fit the model's context."""
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + decoding.max_tokens > self.max_length:
            raise UserError(
                f"a prompt of {longest} tokens and {decoding.max_tokens} to generate exceed the model's "
                f"{self.max_length} positions"
            )
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        rows = decoding.batch_rows
        work = [
            ([prompts[i] for i in order[at : at + rows]], order[at : at + rows], decoding)
            for at in range(0, len(order), rows)
        ]
        answers: list[Any] = [None] * len(prompts)
        for part in self._ask("generate", work, decoding.label):
            for number, text in part:
                answers[number] = text
        return answers

    def dismiss(self) -> None:
        self._broadcast(None)

    def serve(self) -> None:
        """Answers rank 0 until it dismisses."""
        while (question := self._broadcast(None)) is not None:
            self._answer(*question)

    def _ask(self, what: str, work: list, label: str | None) -> list[list]:
        question = (what, work, label)
        self._broadcast(question)
        return [part for part in self._answer(*question) if part is not None]

    def _broadcast(self, question: Any) -> Any:
        if ranks.world_size() == 1:
            return question
        box = [question]
        dist.broadcast_object_list(box, src=0, group=ranks.control_group())
        return box[0]

    @torch.no_grad()
    def _answer(self, what: str, work: list, label: str | None) -> list:
        """Collective. By rank: [(number, answer), ...] of the last stage's first shard, None elsewhere."""
        mine = work[self.replica :: self.replicas]
        handle = {"score": self._score_batch, "generate": Generator(self).run}[what]
        answers: list[tuple[int, Any]] = []
        with _progress(len(mine), label) as progress:
            for item in mine:
                answers += handle(item)
                progress.advance(1)
        speaks = self.last and self.tp_rank == 0
        return ranks.gather(answers if speaks else None)

    # ------------------------------------------------------------------------------------- one batch

    def forward(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor | None:
        """tokens and positions [s] int64 -> final hidden states [s, h] on the last stage, None elsewhere."""
        for attention in self.attentions:
            attention.plan = plan
        if not self.first:
            shape = (len(tokens), 1, self.arch.hidden_size)
            incoming = torch.empty(shape, dtype=self.chunk.config.params_dtype, device=self.device)
            dist.recv(incoming, self._neighbour(-1), group=self.pp_group)
            self.chunk.set_input_tensor(incoming)
        hidden = self.chunk(tokens[None], positions[None], None)
        if self.last:
            return hidden[:, 0]
        dist.send(hidden.contiguous(), self._neighbour(+1), group=self.pp_group)
        return None

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Tensor | None]:
        """Reads prompts into a cache of `capacity` positions; hidden states [r, h] of their last tokens."""
        batch, cache = prompt_batch(prompts), KVCache(capacity)
        hidden = self.forward(*self._inputs(batch), RowPlan(batch.groups, self.device, cache))
        return cache, None if hidden is None else hidden[torch.as_tensor(batch.rows, device=self.device)]

    def decode(self, cache: KVCache, tokens: Tensor, positions: Tensor, used: int) -> Tensor | None:
        """One more token [r] of each sequence at `positions` [r], into the cache; hidden states [r, h]."""
        return self.forward(tokens, positions, DecodePlan(cache, positions, used))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, h] -> logits of this rank's part of the vocabulary [n, V/tp]."""
        return torch.nn.functional.linear(hidden, self.head_weight)

    def _score_batch(self, batch: Batch) -> list[tuple[int, Score]]:
        hidden = self.forward(*self._inputs(batch), RowPlan(batch.groups, self.device))
        if hidden is None:
            return []
        rows = torch.as_tensor(batch.rows, device=self.device)
        targets = torch.as_tensor(batch.targets, device=self.device)
        step = max(1, _LOGITS_BYTES // (self.head_weight.shape[0] * 4))
        logps, hits = [], []
        for at in range(0, len(rows), step):
            logits = self.logits(hidden[rows[at : at + step]])
            metrics = token_logprob_with_metrics(logits, targets[at : at + step], tp_group=self.tp_group)
            logps.append(metrics[0])
            hits.append(metrics[2])
        return _by_request(batch, torch.cat(logps).tolist(), torch.cat(hits).bool().tolist())

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(x, device=self.device) for x in (batch.tokens, batch.positions))

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self.pp_group, dist.get_rank(self.pp_group) + step)


def _by_request(batch: Batch, logps: list[float], hits: list[bool]) -> list[tuple[int, Score]]:
    answers, at = [], 0
    for number, count in zip(batch.requests, batch.counts, strict=True):
        answers.append((number, Score(tuple(logps[at : at + count]), all(hits[at : at + count]))))
        at += count
    return answers


def _load(chunk, source: Source, arch: Architecture, parallel: ParallelConfig) -> None:
    identity = LayerMap.parse("identity", arch.num_layers)
    if source.kind == "megatron":
        from solar_mega.checkpoint.megatron import load_checkpoint

        load_checkpoint(source.path, [chunk], None, identity)
        return
    with ranks.together():
        load_weights([chunk], HFDirectory(source.path).tensors, arch, identity, parallel)


def _plan_attention(chunk) -> list[PlannedAttention]:
    planned = []
    for layer in chunk.decoder.layers:
        core = layer.self_attention.core_attention
        window = window_of(chunk.config, layer.layer_number)
        wrapped = PlannedAttention(core, layer.layer_number, window, getattr(core, "scale", None))
        layer.self_attention.core_attention = wrapped
        planned.append(wrapped)
    return planned


class _Silent:
    def advance(self, amount: float = 1) -> None:
        pass


@contextmanager
def _progress(total: int, label: str | None) -> Iterator[Any]:
    if label is None or total == 0:
        yield _Silent()
        return
    with Progress(total, "batches", label) as progress:
        yield progress
