"""`solar-mega probe`: which layer map to grow a model by, measured before anything is written."""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import Progress, human_bytes, human_count, human_seconds, say
from solar_mega.runtime.files import atomic_file

if TYPE_CHECKING:
    from solar_mega.checkpoint.source import Source
    from solar_mega.data.tokenizer import Tokenizer
    from solar_mega.depth.layer_map import LayerMap
    from solar_mega.evaluate.probe import Text


@dataclass(frozen=True)
class ProbeOptions:
    """What growing SRC by depth would do to it: loss at step 0 of dus:m for every m and of its rivals, how
    unlike the activations on both sides of each seam are, and how much each layer changes its input. No model
    is written: the layers of the source run in the order that each map says."""

    src: Positional[Path]
    """Hugging Face directory, Megatron checkpoint, or a run's directory."""

    text: Path
    """What to measure on: a .txt, .jsonl or .parquet file. Take what the grown model will be trained on."""

    m: tuple[str, ...] = ()
    """The m of dus:m to scan, such as `--m 0,2,4,8`; default: every one from 0 to n/2."""

    rivals: tuple[str, ...] = ("stack:2", "interleave:2")
    """Other layer maps to compare, such as `--rivals stack:2,llama-pro:4`."""

    tokenizer: Path | None = None
    """Tokenizer directory or SentencePiece model; default: the model's own."""

    tokens: int = 16384
    """Tokens of the text to use, from its beginning."""

    seq_length: int = 1024
    """Tokens per window; at most what the model and the text allow."""

    key: str = "text"
    """JSON key or parquet column that holds the document."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the arithmetic; hidden states between layers are fp32 always."""

    stream: bool | None = None
    """Read one layer at a time from the disk instead of keeping all in memory; default: where the weights
    take more than half of the free memory."""

    out: Path | None = None
    """Write the report as JSON to this file."""

    plot: Path | None = None
    """Draw it (PNG, SVG or PDF); default: beside --out, as PNG."""

    threads: int | None = None
    """CPU threads; default: all cores."""


def probe(argv: Sequence[str]) -> int:
    """`solar-mega probe SRC --text FILE`"""
    options = parse_options(ProbeOptions, argv, "probe")
    from solar_mega.checkpoint.source import open_source
    from solar_mega.data.tokenizer import check_vocabulary, load_tokenizer
    from solar_mega.evaluate.probe import check
    from solar_mega.model.architecture import Architecture

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("probe runs in one process; start it without torchrun")
    source = open_source(options.src, "SRC")
    arch = Architecture.from_hf(source.config, str(source.path))
    numbers, maps = read_maps(options, arch.num_layers)
    check(maps)
    for layer_map in maps:
        arch.grown(layer_map)  # raises where layers of different kinds would be averaged
    tokenizer = load_tokenizer(options.tokenizer or source.side_files)
    check_vocabulary(tokenizer, arch.vocab_size)
    text = read_text(options, tokenizer, arch.max_position_embeddings)
    report = _measure(options, source, arch, numbers, maps, text)
    from solar_mega.evaluate.probe_report import as_text

    say(as_text(report))
    plot = options.plot or (options.out.with_suffix(".png") if options.out else None)
    if options.out is not None:
        with atomic_file(options.out) as stream:
            stream.write(json.dumps(report, indent=2) + "\n")
    if plot is not None:
        from solar_mega.evaluate.probe_plot import draw

        draw(report, plot)
    written = " and ".join(str(path) for path in (options.out, plot) if path is not None)
    say(f"{written or 'nothing written (--out FILE keeps the report)'}; {human_seconds(report['seconds'])}")
    return 0


def read_maps(options: ProbeOptions, n: int) -> tuple[list[int], "list[LayerMap]"]:
    """(the m to scan, their maps and then the rivals'). Raises UserError listing everything wrong."""
    from solar_mega.depth.layer_map import LayerMap

    problems = Problems()
    words = [word for text in options.m for word in text.split(",") if word]
    numbers = []
    for word in words or map(str, range(n // 2 + 1)):
        if not word.isdigit() or int(word) >= n:
            problems.add(f"--m {word}: must be whole numbers from 0 to {n - 1}, such as --m 0,2,4")
        else:
            numbers.append(int(word))
    numbers = sorted(set(numbers))
    maps = [LayerMap.parse(f"dus:{m}", n) for m in numbers]
    # Maps may hold commas themselves: slices:0-4,2-6. The next map begins with a letter.
    for spelling in (s for text in options.rivals for s in re.split(r",(?=[a-z])", text) if s):
        try:
            maps.append(LayerMap.parse(spelling, n))
        except UserError as error:
            problems.add(f"--rivals {spelling}: {error}")
    problems.raise_if_any("probe")
    return numbers, maps


def read_text(options: ProbeOptions, tokenizer: "Tokenizer", longest: int) -> "Text":
    """Documents joined by EOS, cut into windows; a remainder shorter than a window is left out.

    Raises UserError for unreadable files and text of fewer than two tokens.
    """
    import torch

    from solar_mega.data.documents import cut_into_pieces
    from solar_mega.data.sources import ReadOptions, check_sources, find_sources
    from solar_mega.evaluate.probe import Text

    if options.tokens < 2 or options.seq_length < 1:
        raise UserError(
            f"--tokens {options.tokens}, --seq-length {options.seq_length}: at least 2 tokens, windows of 1"
        )
    reading = ReadOptions(options.key)
    sources = find_sources([str(options.text)])
    check_sources(sources, reading)
    ids: list[int] = []
    records = (record for piece in cut_into_pieces(sources, reading) for record in piece.records(reading))
    for record in records:
        if not isinstance(record, str):
            raise UserError(f"--text: {record.describe()}")
        ids += [*tokenizer.encode(record), tokenizer.eos_id]
        if len(ids) > options.tokens:
            break
    window = min(options.seq_length, longest, max(1, len(ids) - 1))
    windows = max(1, min(len(ids) - 1, options.tokens) // window)
    if len(ids) < 2:
        raise UserError(f"--text {options.text}: holds {len(ids)} tokens; at least 2 are needed")
    cut = torch.tensor(ids[: windows * window + 1], dtype=torch.int64)
    return Text(cut[:-1].view(windows, window), cut[1:].view(windows, window))


def _measure(
    options: ProbeOptions,
    source: "Source",
    arch: Any,
    numbers: "list[int]",
    maps: "list[LayerMap]",
    text: "Text",
) -> dict[str, Any]:
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.evaluate.probe import probe as measure
    from solar_mega.evaluate.probe import states_kept, work
    from solar_mega.evaluate.probe_layers import Layers
    from solar_mega.evaluate.probe_report import as_json, suggest
    from solar_mega.runtime import parallel as ranks

    windows, length = text.tokens.shape
    n = arch.num_layers
    stream = _streams(options, arch)
    states = 4 * states_kept(n, maps) * windows * length * arch.hidden_size
    say(
        f"{source.path}: {n} layers, {human_count(arch.parameters())} parameters; {windows} windows of "
        f"{length} tokens; {len(maps)} maps; weights "
        f"{'from disk layer by layer' if stream else 'in memory'}, hidden states {human_bytes(states)}"
    )
    started = time.monotonic()
    with ranks.running(ParallelConfig(), threads=options.threads):
        layers = Layers(_reader(source, arch), arch, options.precision, 1 if stream else n, length)
        with Progress(work(n, maps), "layers", "probe") as line:
            found = measure(layers, text, maps, max(1, 2048 // length), line.advance)
    dus = [(m, facts.loss) for m, facts in zip(numbers, found.maps, strict=False)]
    about = {
        "source": str(source.path),
        "architecture": (source.config.get("architectures") or [""])[0],
        "parameters": arch.parameters(),
        "text": str(options.text),
        "windows": windows,
        "seq_length": length,
        "precision": options.precision,
        "streamed": stream,
        "seconds": time.monotonic() - started,
    }
    return as_json(found, numbers, suggest(n, found.loss, dus), about)


def _streams(options: ProbeOptions, arch: Any) -> bool:
    if options.stream is not None:
        return options.stream
    import psutil

    weights = arch.parameters() * (4 if options.precision == "fp32" else 2)
    return weights > psutil.virtual_memory().available / 2


def _reader(source: "Source", arch: Any) -> Any:
    """The source's tensors by Hugging Face name."""
    if source.kind == "hf":
        from solar_mega.artifact.hf import HFDirectory
        from solar_mega.checkpoint.from_hf import check_source

        directory = HFDirectory(source.path)
        check_source(directory.tensors, arch, str(source.path))
        return directory.tensors
    from solar_mega.checkpoint.items import CheckpointTensors
    from solar_mega.checkpoint.views import MegatronView

    view = MegatronView(CheckpointTensors(source.path), arch)
    view.check()
    return view
