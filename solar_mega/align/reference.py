"""The reference model's log-probs: one forward-only pass of the run's own model, before it learns anything.

The policy begins as the reference, so its initial weights, on the run's own TP x PP x DP, are all it takes;
no second model is ever in memory. The sums per response are kept on disk under a key of everything they
depend on, in pieces of a few hundred pairs: a run that is killed goes on where the pass was, another run with
the same model and data does not need the pass at all.

    <cache>/<key>/key.json            what the key was made of
    <cache>/<key>/00000512.npy        fp64 [pairs, 2]: summed log-probs of chosen and rejected, from pair 512
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from solar_mega.align.objective import loss_offsets, packed_losses
from solar_mega.align.pair_batches import Loader, RowPlan
from solar_mega.data.preference_tokens import TokenPair
from solar_mega.errors import UserError
from solar_mega.ops.dpo_loss import dpo_loss
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import Progress, say
from solar_mega.runtime.files import atomic_file

PIECE = 512
"""Pairs of a file."""


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that reference log-probs depend on."""

    checkpoint: str
    """Content hash of the model directory, or what else its weights are made from."""
    data: str
    """Fingerprint of the tokenised pairs."""
    template: str
    precision: str
    numerics: str
    """Layout and row length where they move the result: bf16 rounds what each of them sums in another order
    by more than the first step's loss may differ from ln 2. Empty in fp32."""

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:32]


class ReferenceCache:
    """The files of one key. Written by rank 0, read by all."""

    def __init__(self, root: Path, key: ReferenceKey, pairs: int) -> None:
        self.directory = root / key.name
        self.key, self.pairs = key, pairs

    def pieces(self) -> list[range]:
        return [range(first, min(first + PIECE, self.pairs)) for first in range(0, self.pairs, PIECE)]

    def missing(self) -> list[range]:
        """Pieces that are not there, or not whole."""
        return [piece for piece in self.pieces() if self.read(piece) is None]

    def read(self, piece: range) -> np.ndarray | None:
        try:
            values = np.load(self._file(piece), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return values if values.shape == (len(piece), 2) and values.dtype == np.float64 else None

    def write(self, piece: range, values: np.ndarray) -> None:
        """Atomic: a file under its name is whole."""
        if not (self.directory / "key.json").exists():
            with atomic_file(self.directory / "key.json") as stream:
                stream.write(json.dumps(vars(self.key), indent=1) + "\n")
        with atomic_file(self._file(piece), "wb") as stream:
            np.save(stream, np.ascontiguousarray(values, np.float64))

    def load(self) -> np.ndarray:
        """[pairs, 2]. Raises UserError when a piece is gone."""
        parts = [self.read(piece) for piece in self.pieces()]
        if any(part is None for part in parts):
            raise UserError(f"{self.directory}: reference log-probs disappeared; start the run again")
        return np.concatenate(parts)  # type: ignore[arg-type]

    def _file(self, piece: range) -> Path:
        return self.directory / f"{piece.start:08d}.npy"


def missing_anywhere(cache: ReferenceCache) -> list[range]:
    """What rank 0 finds missing, on every rank. Collective."""
    return ranks.gather(cache.missing() if ranks.is_main() else None)[0]


def reference_logps(
    chunks: Sequence[nn.Module],
    pairs: Sequence[TokenPair],
    plan: RowPlan,
    cache: ReferenceCache,
    label: str = "reference log-probs",
) -> np.ndarray:
    """[pairs, 2] fp64 on every rank, computed where the cache has none. Collective.

    Args:
        chunks: the model's chunks of this rank, holding the reference's weights; not under DDP.
    """
    missing = missing_anywhere(cache)
    done = len(pairs) - sum(map(len, missing))
    if not missing:
        say(f"{label}: {len(pairs):,} pairs from {cache.directory}")
        return cache.load()
    with Progress(len(pairs), "pairs", label, initial=done) as progress:
        for piece in missing:
            values = compute(chunks, pairs, list(piece), plan)
            with ranks.together():
                if ranks.is_main():
                    cache.write(piece, values)
            progress.advance(len(piece))
    with ranks.together():
        return cache.load()


@torch.no_grad()
def compute(
    chunks: Sequence[nn.Module], pairs: Sequence[TokenPair], numbers: Sequence[int], plan: RowPlan
) -> np.ndarray:
    """[numbers, 2] fp64 on every rank: summed log-probs of both responses under the model. Collective."""
    from megatron.core import parallel_state

    for chunk in chunks:
        chunk.eval()
    rows = plan.rows(numbers, pairs)
    sums = _forward(chunks, Loader(pairs, None, plan), numbers, plan)
    mine: list[tuple[list[int], np.ndarray]] = []
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        for row, values in zip(plan.mine(rows), sums, strict=True):
            mine.append((row, values.cpu().numpy().reshape(-1, 2)))
    place = {number: i for i, number in enumerate(numbers)}
    result = np.full((len(numbers), 2), np.nan)
    for part in ranks.gather(mine):
        for row, values in part:
            result[[place[number] for number in row]] = values
    if not np.isfinite(result).all():
        bad = [numbers[i] for i in np.flatnonzero(~np.isfinite(result).all(1))][:5]
        raise UserError(
            f"reference log-probs of pairs {', '.join(map(str, bad))} are not finite: the model's weights "
            "or those pairs are broken"
        )
    return result


def _forward(
    chunks: Sequence[nn.Module], loader: Loader, numbers: Sequence[int], plan: RowPlan
) -> list[Tensor]:
    """[2 P] fp64 for each of this rank's rows, on the last pipeline stage; an empty list elsewhere."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from solar_mega.train.step import on_device

    batches = list(loader.batches(numbers))

    def step(iterator: Any, chunk: nn.Module):
        batch = on_device(next(iterator))
        return packed_losses(chunk, batch), lambda output, non_loss_data=False: _sums(output, batch)

    virtual = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if virtual else iter(batches),
        model=list(chunks) if virtual else chunks[0],
        num_microbatches=len(batches),
        seq_length=plan.length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _sums(output: Tensor, batch: dict[str, Any]) -> Tensor:
    if batch["pairs"] == 0:
        return torch.zeros(0, dtype=torch.float64)
    ends = loss_offsets(batch, output.device)
    return dpo_loss(-output.flatten(), ends, mask=batch["loss_mask"].flatten() != 0).sums
