"""Conversations -> tokens on disk: made once, by one process, and mapped into memory by all that train.

    <cache>/sft-<key>/  ids.npy [tokens] int32      starts.npy [conversations + 1] int64
                        loss.npy [tokens] bool      report.txt

The key is a hash of all that decides the tokens: the bytes of the data sets, how they are read, template,
tokenizer, length.
"""

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from solar_mega.data.chat import BadConversation, ChatTemplate, Encoded, encode
from solar_mega.data.instructions import Instruction, InstructionReport, read_instructions
from solar_mega.data.rows import DatasetSpec
from solar_mega.data.tokenizer import Tokenizer
from solar_mega.errors import UserError
from solar_mega.runtime.console import Progress
from solar_mega.runtime.files import atomic_directory

_LAYOUT = 1  # of the cache; counted up when what is stored changes its meaning
_CHUNK = 1 << 22
TOO_LONG, FILLED = "longer than train.seq_length", "the prompt fills train.seq_length"


@dataclass(frozen=True)
class TokenOptions:
    """How conversations become tokens."""

    seq_length: int
    """Places of a row; a conversation may have one token more."""
    overlong: Literal["drop", "truncate"] = "drop"
    seed: int = 1234
    """Chooses the rows where a data set is subsampled."""
    strict: bool = False
    """Rows that cannot be trained on as they are, are an error."""


class TokenizedSet(Sequence[Encoded]):
    """Tokenised conversations, in the order of their data sets and rows.

    Attributes:
        lengths: tokens of each.
        report: what became of the rows, for the console.
        fingerprint: hash of all that decides the tokens.
    """

    def __init__(
        self, ids: np.ndarray, loss: np.ndarray, starts: np.ndarray, report: str, fingerprint: str
    ) -> None:
        self._ids, self._loss, self._starts = ids, loss, starts
        self.lengths = np.diff(starts).tolist()
        self.report, self.fingerprint = report, fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        begin, end = self._starts[index], self._starts[index + 1]
        return Encoded(self._ids[begin:end], self._loss[begin:end])

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])


def tokenized(
    specs: Sequence[DatasetSpec],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    options: TokenOptions,
    cache: Path,
) -> TokenizedSet:
    """The conversations of `specs`, from `cache` or made and kept there.

    Raises:
        UserError: nothing to read or nothing usable in a data set, or in strict mode any row at fault.
    """
    key = _key(specs, template, tokenizer, options)
    place = Path(cache) / f"sft-{key}"
    if not place.exists():
        with atomic_directory(place) as directory:
            _write(directory, specs, template, tokenizer, options)
    ids, loss, starts = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ids", "loss", "starts"))
    return TokenizedSet(ids, loss, starts, (place / "report.txt").read_text(encoding="utf-8"), key)


def _write(
    directory: Path,
    specs: Sequence[DatasetSpec],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    options: TokenOptions,
) -> None:
    encoded: list[Encoded] = []
    reports = []
    for spec in specs:
        instructions, report = read_instructions(spec, options.seed)
        encoded += tokenize(instructions, template, tokenizer, options, report)
        reports.append(report.describe())
        if options.strict:
            report.refuse_faults()
        if not report.kept:
            raise UserError(f"no row of {spec.path} is left after tokenising\n{report.describe()}")
    starts = np.concatenate([[0], np.cumsum([len(one) for one in encoded])]).astype(np.int64)
    np.save(directory / "ids.npy", np.concatenate([one.ids for one in encoded]))
    np.save(directory / "loss.npy", np.concatenate([one.loss for one in encoded]))
    np.save(directory / "starts.npy", starts)
    (directory / "report.txt").write_text("\n".join(reports), encoding="utf-8")


def tokenize(
    instructions: Sequence[Instruction],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    options: TokenOptions,
    report: InstructionReport,
) -> list[Encoded]:
    """Tokens of every conversation that fits; what does not, and why, is counted in `report`."""
    done = []
    with Progress(len(instructions), "rows", f"tokenise {report.name}") as progress:
        for instruction in instructions:
            try:
                whole = encode(instruction.messages, template, tokenizer)
                one = fitted(whole, options)
            except BadConversation as fault:
                report.drop(str(fault), instruction.where)
                report.kept -= 1
                continue
            finally:
                progress.advance(1)
            done.append(one)
            report.truncated += len(one) < len(whole)
            report.tokens += len(one)
            report.loss_tokens += int(one.loss.sum())
            report.boundary += one.boundary > 0
    return done


def fitted(one: Encoded, options: TokenOptions) -> Encoded:
    """`one` within the limit of `options`, cut at its end where they say so. Raises BadConversation."""
    limit = options.seq_length + 1
    if not one.loss[1:].any():
        raise BadConversation("nothing to predict")
    if len(one) <= limit:
        return one
    if not one.loss[1:limit].any():
        raise BadConversation(FILLED)
    if options.overlong == "drop":
        raise BadConversation(TOO_LONG)
    return Encoded(one.ids[:limit], one.loss[:limit], one.boundary)


def _key(
    specs: Sequence[DatasetSpec], template: ChatTemplate, tokenizer: Tokenizer, options: TokenOptions
) -> str:
    facts = [_LAYOUT, template.fingerprint, tokenizer.fingerprint, vars(options)]
    facts += [[vars(spec), content_hash(Path(spec.path).expanduser())] for spec in specs]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]


def content_hash(path: Path) -> str:
    """Of a file, of every file of a directory, of those a pattern matches; "" for what is not on this
    machine."""
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.is_file())
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()
