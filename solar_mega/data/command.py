"""`solar-mega tokenize` and `solar-mega tokenizer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.data.documents import cut_into_pieces
from solar_mega.data.sources import ReadOptions, check_sources, find_sources
from solar_mega.data.tokenize import TokenizeReport, check_request
from solar_mega.data.tokenize import tokenize as run_tokenize
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.runtime.console import human_bytes, human_count, human_seconds, say


@dataclass(frozen=True)
class TokenizeOptions:
    """Text to a Megatron corpus: OUTPUT.bin and OUTPUT.idx, readable by stock Megatron, and OUTPUT.json,
    which lets training notice a wrong tokenizer. EOS ends every document."""

    inputs: Positional[tuple[str, ...]]
    """Files, directories or globs of .jsonl, .parquet or .txt; .jsonl and .txt also as .gz or .zst."""

    tokenizer: Path
    """Hugging Face tokenizer directory or SentencePiece .model file."""

    output: Path
    """Name of the corpus without suffix: data/text makes data/text.bin, .idx and .json."""

    workers: int | None = None
    """Processes; default: the cores this process may use. The corpus does not depend on it."""

    key: str = "text"
    """JSON key or parquet column that holds the document."""

    format: Literal["auto", "jsonl", "parquet", "txt"] = "auto"
    """What the files are, where their suffixes do not say it."""

    txt_document: Literal["file", "line"] = "file"
    """Whether a text file is one document or has one per line."""

    skip_bad: bool = False
    """Count unusable records (bad JSON, no such key, not UTF-8) and go on; default: stop and list them."""

    parse_special_tokens: bool = False
    """Recognise special tokens spelled out in the text, as Megatron's preprocessing does. By default `</s>`
    in a document is text like any other."""

    overwrite: bool = False
    """Replace an existing corpus of that name."""


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a lossless SentencePiece BPE tokenizer (byte fallback, spaces and newlines kept) and write it
    both as tokenizer.model and for transformers."""

    inputs: Positional[tuple[str, ...]]
    """Files, directories or globs of .jsonl, .parquet or .txt."""

    output: Path
    """New or empty directory."""

    vocab_size: int = 32000
    """Tokens, including 3 special ones and 256 bytes."""

    max_bytes: int = 100_000_000
    """Bytes of text to train on, from the beginning of the input."""

    threads: int = 1
    """Training threads."""

    key: str = "text"
    """JSON key or parquet column that holds the document."""

    format: Literal["auto", "jsonl", "parquet", "txt"] = "auto"
    """What the files are, where their suffixes do not say it."""


def tokenize(argv: Sequence[str]) -> None:
    options = parse_options(TokenizeOptions, argv, "tokenize")
    reading = ReadOptions(options.key, options.txt_document)
    format = None if options.format == "auto" else options.format
    check_request(options.inputs, options.output, reading, format, options.skip_bad, options.overwrite)
    report = run_tokenize(
        options.inputs,
        load_tokenizer(options.tokenizer, options.parse_special_tokens),
        options.output,
        options=reading,
        format=format,
        workers=options.workers,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
    )
    say(describe(report))


def describe(report: TokenizeReport) -> str:
    """The report as a few lines for the console."""
    skipped = f"{report.empty} empty and {report.bad} unusable records left out"
    lines = [
        f"{report.prefix}.bin, .idx, .json",
        f"  {report.documents:,} documents, {human_count(report.tokens)} tokens from "
        f"{human_bytes(report.text_bytes)} of text "
        f"({report.tokens_per_byte:.3f} tokens per byte)",
        f"  {human_seconds(report.seconds)} with {report.workers} worker{'s' * (report.workers > 1)}: "
        f"{human_count(report.tokens_per_second)} tokens/s",
    ]
    if report.empty or report.bad:
        lines.append(f"  {skipped}" + "".join(f"\n    {record.describe()}" for record in report.first_bad))
    return "\n".join(lines)


def tokenizer(argv: Sequence[str]) -> None:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    options = parse_options(TokenizerOptions, argv, "tokenizer")
    reading = ReadOptions(options.key)
    sources = find_sources(options.inputs, None if options.format == "auto" else options.format)
    check_sources(sources, reading)
    texts = (
        record
        for piece in cut_into_pieces(sources, reading)
        for record in piece.records(reading)
        if isinstance(record, str)
    )
    trained = train_sentencepiece(
        texts, options.vocab_size, options.output, max_bytes=options.max_bytes, threads=options.threads
    )
    say(
        f"{options.output}: {trained.vocab_size} tokens, EOS {trained.eos_id}, fingerprint "
        f"{trained.fingerprint}"
    )
