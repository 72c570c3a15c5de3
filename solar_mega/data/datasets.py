"""Sample i of a run, for every i: megatron-core's GPTDataset and BlendedDataset, one epoch at a time.

    corpus part ──▶ GPTDataset of epoch 0, 1, 2, ...  ──▶ Epochs ─┐
    corpus part ──▶ GPTDataset of epoch 0, 1, 2, ...  ──▶ Epochs ─┴▶ BlendedDataset ──▶ sample i

Megatron shuffles all epochs of a run as one, so that the order of the data depends on the length of the run:
train for more steps than first planned, and a resumed run sees other samples than it would have. Here every
epoch is an index of its own (seeded with seed and epoch), and the blending order does not look ahead. Sample
i depends on corpora, weights, sequence length and seed, and on nothing else.

A sample is seq_length + 1 consecutive tokens of the epoch's shuffled documents, EOS between them; the next
one starts at its last token, which is its last label: every token is a label once, except the first of an
epoch and the remainder that fills no sample.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solar_mega.config.schema import DataConfig
from solar_mega.data.corpora import Part, check_corpora
from solar_mega.data.indexed import corpus_paths
from solar_mega.errors import UserError
from solar_mega.runtime.files import atomic_directory

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# Indices of fewer entries (documents + samples) than this are built by every rank for itself, in memory, in
# well under a second; larger ones once, by rank 0, into the cache.
_CACHED_FROM = 2_000_000
# Validation draws the same samples whatever the seed, so that runs can be compared.
_VALIDATION_SEED = 0


def build_datasets(
    data: DataConfig,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    eos_id: int,
    cache_dir: Path | None = None,
    *,
    vocab_size: int | None = None,
    fingerprint: str | None = None,
    cached_from: int = _CACHED_FROM,
) -> tuple[Any, Any]:
    """Training and validation data as indexable datasets of exactly train_samples and valid_samples samples.

    A sample is a dict of tokens, labels, position_ids (int64 [seq_length]) and loss_mask (float32
    [seq_length], all ones). Every rank calls this (there are barriers where torch.distributed runs); a
    process without torch.distributed may call it too. No CUDA needed.

    Args:
        cache_dir: where indices of large corpora are kept, on a file system that all ranks see. None: in
        memory. vocab_size, fingerprint: of the model and its tokenizer; None leaves them unchecked.
        cached_from: index entries from which the cache is used.

    Returns:
        (train, valid); valid is None when valid_samples is 0.

    Raises:
        UserError: everything wrong with the corpora (see corpora.check_corpora).
    """
    blends = check_corpora(
        data,
        seq_length,
        validation=valid_samples > 0,
        vocab_size=vocab_size,
        eos_id=eos_id,
        fingerprint=fingerprint,
    )
    _require_helpers()
    indices = _Indices(seq_length, eos_id, cache_dir, cached_from)
    with _quiet_megatron():
        train = _blend(blends.train, train_samples, seed, indices, "train")
        valid = (
            _blend(blends.valid, valid_samples, _VALIDATION_SEED, indices, "valid") if valid_samples else None
        )
    return train, valid


class Epochs:
    """Epoch after epoch of one corpus part, cut to `samples`. Has what BlendedDataset asks of a dataset."""

    def __init__(self, epochs: Sequence["GPTDataset"], samples: int) -> None:
        self.epochs = epochs
        self.per_epoch = len(epochs[0])
        self.samples = samples
        self.index_split = epochs[0].index_split
        self.unique_identifiers = {**epochs[0].unique_identifiers, "epochs": len(epochs), "samples": samples}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        epoch, sample = divmod(index, self.per_epoch)
        return self.epochs[epoch][sample]


@dataclass(frozen=True)
class _Identity:
    """Stands in for Megatron's tokenizer. Of a tokenizer the dataset reads only `eod`; having no `pad`, it
    masks nothing. `unique_identifiers` enter the names of cached indices."""

    eod: int
    vocab_size: None
    unique_identifiers: dict[str, Any]


@dataclass(frozen=True)
class _Indices:
    """How and where indices are built: one rank first, the others from its files, or all in memory."""

    seq_length: int
    eos_id: int
    cache_dir: Path | None
    cached_from: int

    def config(
        self, split: str, seed: int, identity: dict[str, Any], place: Path | None
    ) -> "GPTDatasetConfig":
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        return GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.seq_length,
            blend=(["unused"], None),  # only so that Megatron does not take this for mock data
            split={"train": "1,0,0", "valid": "0,1,0"}[split],
            path_to_cache=""
            if place is None
            else str(place),  # "" is memory; None would be beside the corpus
            tokenizer=_Identity(self.eos_id, None, identity),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    def build(self, make: Any, entries: int, identity: dict[str, Any]) -> Any:
        """make(place) with place None (memory) or a directory that holds finished indices of this
        identity."""
        if self.cache_dir is None or entries < self.cached_from:
            return make(None)
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        place = Path(self.cache_dir) / name
        distributed = _distributed()
        if (distributed is None or distributed.get_rank() == 0) and not place.exists():
            # Megatron writes its files one by one and takes all present for all complete
            with atomic_directory(place) as directory:
                make(directory)
        if distributed is not None:
            distributed.barrier()
        return make(place)


def _blend(parts: Sequence[Part], samples: int, seed: int, indices: _Indices, split: str) -> Any:
    total = sum(part.weight for part in parts)
    # Blending keeps each corpus within one sample per corpus of its exact share.
    wanted = [min(samples, math.ceil(samples * part.weight / total) + len(parts)) for part in parts]
    sets = [_epochs(part, count, seed, indices, split) for part, count in zip(parts, wanted, strict=True)]
    if len(sets) == 1:
        return sets[0]
    from megatron.core.datasets.blended_dataset import BlendedDataset

    weights = [part.weight / total for part in parts]
    identity = {
        "blend": [_stamp(part) for part in parts],
        "weights": weights,
        "samples": samples,
        "seed": seed,
    }
    identity |= {"split": split, "seq_length": indices.seq_length}

    def make(place: Path | None) -> Any:
        return BlendedDataset(sets, weights, samples, indices.config(split, seed, identity, place))

    # Without a process group Megatron asks for a rank that is not there, but only when it caches
    return indices.build(make, samples, identity) if _distributed() else make(None)


def _epochs(part: Part, samples: int, seed: int, indices: _Indices, split: str) -> Epochs:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    per_epoch = part.samples_per_epoch(indices.seq_length)
    documents = np.arange(part.first, part.last, dtype=np.int32)
    corpus: IndexedDataset | None = None
    epochs = []
    for epoch in range(max(1, math.ceil(samples / per_epoch))):
        identity = {
            "corpus": _stamp(part),
            "seed": seed,
            "epoch": epoch,
            "split": split,
            "seq_length": indices.seq_length,
        }
        config = partial(indices.config, split, _epoch_seed(seed, epoch), identity)
        corpus = corpus or GPTDataset.build_low_level_dataset(str(part.corpus.prefix), config(None))

        def make(place: Path | None, corpus: Any = corpus, config: Any = config) -> "GPTDataset":
            return GPTDataset(corpus, str(part.corpus.prefix), documents, None, Split[split], config(place))

        epochs.append(indices.build(make, part.last - part.first + per_epoch, identity))
    assert len(epochs[0]) == per_epoch
    return Epochs(epochs, samples)


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed for numpy's RandomState (32 bits) that no other (seed, epoch) of practical size shares."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _stamp(part: Part) -> dict[str, Any]:
    """What the corpus is, by content: sizes and both ends of its index, whatever its path or date. A corpus
    tokenised anew under the same name must not meet the indices of the old one."""
    idx = corpus_paths(part.corpus.prefix)[2]
    digest, size = hashlib.sha256(), idx.stat().st_size
    with open(idx, "rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return {
        "index": digest.hexdigest()[:24],
        "index_bytes": size,
        "tokens": part.corpus.tokens,
        "documents": [part.first, part.last],
    }


def _distributed() -> Any:
    import torch.distributed

    return (
        torch.distributed if torch.distributed.is_available() and torch.distributed.is_initialized() else None
    )


def _require_helpers() -> None:
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"megatron-core is installed without its compiled dataset helpers ({error}); install its wheel: "
            "pip install --force-reinstall --no-deps --only-binary :all: megatron-core"
        ) from error


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Indices kept in memory on purpose are no reason for a warning each."""
    logger = logging.getLogger("megatron.core.datasets")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
