"""`solar-mega bench tokenize`: text to a corpus, ours beside the way of Megatron-LM's preprocess_data.py.

The peer is written as that tool is: a pool of processes, each with a tokenizer, one JSON line a task and 32
lines a parcel; the parent adds document after document to megatron-core's IndexedDatasetBuilder. Both use the
same tokenizer definition and the same number of processes, in turns, and must write the same tokens.
"""

import json
import multiprocessing
import statistics
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from solar_mega.errors import UserError
from solar_mega.runtime.console import say, table


@dataclass(frozen=True)
class TokenizeBench:
    """Tokens per second from text to a Megatron corpus, beside megatron-core's own way."""

    tokenizer: Path | None = None
    """Tokenizer directory; default: one of 8192 pieces trained on the text."""
    text: Path | None = None
    """jsonl with a `text` in each line; default: the sources of Python's standard library."""
    megabytes: int = 24
    """Of that text, repeated as often as it takes."""
    workers: int = 2
    """Processes, of each."""
    rounds: int = 3
    """Turns of each."""
    out: Path | None = None
    """Write the result as JSON to this file."""


def run(o: TokenizeBench) -> dict:
    """Measure, print a table, return (and write) the result. Raises UserError when the corpora differ."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = _text(o, root)
        tokenizer = o.tokenizer or _train_tokenizer(text, root / "tokenizer")
        ways = {"solar_mega": _ours, "megatron preprocess_data": _megatron}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens = 0
        for number in range(o.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                ways[name](text, tokenizer, root / name.split()[0], o.workers)
                seconds[name].append(time.perf_counter() - begin)
            tokens = _same_tokens(root / "solar_mega", root / "megatron")
    return _report(o, seconds, tokens)


def _report(o: TokenizeBench, seconds: dict[str, list[float]], tokens: int) -> dict:
    ours = seconds["solar_mega"]
    providers, rows = {}, []
    for name, values in seconds.items():
        rate = tokens / statistics.median(values)
        ratio = statistics.median(other / mine for other, mine in zip(values, ours, strict=True))
        providers[name] = {
            "tokens_per_second": round(rate),
            "seconds": [round(value, 3) for value in values],
            "ours_over_this": round(ratio, 3),
        }
        rows.append((name, f"{rate:,.0f}", f"{statistics.median(values):.2f}", f"{ratio:.2f}"))
    say(table(rows, ("tokenize", "tokens/s", "seconds", "ours is x times as fast")))
    settings = {"megabytes": o.megabytes, "workers": o.workers, "rounds": o.rounds, "tokens": tokens}
    result = {"device": "cpu", "settings": settings, "providers": providers}
    if o.out is not None:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _text(o: TokenizeBench, root: Path) -> Path:
    """A jsonl file of the size asked for."""
    if o.text is not None:
        lines = o.text.read_text("utf-8").splitlines()
    else:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        lines = [json.dumps({"text": file.read_text("utf-8", errors="replace")}) for file in sources]
    path, wanted, written = root / "text.jsonl", o.megabytes * 10**6, 0
    with path.open("w", encoding="utf-8") as stream:
        while written < wanted:
            for line in lines:
                written += stream.write(line + "\n")
                if written >= wanted:
                    break
    return path


def _train_tokenizer(text: Path, directory: Path) -> Path:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    with text.open(encoding="utf-8") as stream:
        sample = [json.loads(line)["text"] for _, line in zip(range(100), stream, strict=False)]
    train_sentencepiece(sample, 8192, directory)
    return directory


def _ours(text: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    from solar_mega.data.tokenize import tokenize
    from solar_mega.data.tokenizer import load_tokenizer

    tokenize([str(text)], load_tokenizer(tokenizer), prefix, workers=workers, overwrite=True)


_worker: dict = {}


def _megatron(text: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if vocabulary < 65500 else np.int32)
    start = partial(_start_worker, tokenizer)
    with (
        multiprocessing.get_context("spawn").Pool(workers, initializer=start) as pool,
        text.open(encoding="utf-8") as stream,
    ):
        for ids in pool.imap(_encode, stream, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _start_worker(tokenizer: Path) -> None:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    _worker["tokenizer"] = AutoTokenizer.from_pretrained(tokenizer)


def _encode(line: str) -> list[int]:
    tokenizer = _worker["tokenizer"]
    ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _same_tokens(ours: Path, theirs: Path) -> int:
    """Number of tokens. Raises UserError when the corpora are not the same bytes."""
    mine, other = (Path(f"{prefix}.bin") for prefix in (ours, theirs))
    if mine.read_bytes() != other.read_bytes():
        raise UserError("the two ways wrote different tokens; they cannot be compared")
    from solar_mega.data.indexed import open_corpus

    return open_corpus(ours).tokens
