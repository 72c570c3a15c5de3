"""`solar-mega quickstart prepare|report|lessons`: the steps of launch/quickstart.sh and of the tiny recipe
that are not verbs of their own."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.errors import UserError
from solar_mega.runtime.console import human_bytes, say


@dataclass(frozen=True)
class QuickstartOptions:
    """Parts of launch/quickstart.sh and launch/recipe.sh tiny. `prepare` collects the standard library's
    source files as text, trains a tokenizer on them and lays down the model's config. `report` compares the
    finished runs. `lessons` writes small self-made data sets for tuning and evaluation."""

    step: Positional[str]
    """prepare, report or lessons."""

    root: Path = Path("runs/quickstart")
    """Where the quickstart keeps everything."""

    model_config: Path = Path("configs/tiny/model/config.json")
    """Shape of the base (prepare)."""

    text_bytes: int = 6_000_000
    """Bytes of source text to collect (prepare)."""

    seconds: float = 0.0
    """Compute time of the stages before (report)."""


def quickstart(argv: Sequence[str]) -> None:
    options = parse_options(QuickstartOptions, argv, "quickstart")
    if options.step == "prepare":
        _prepare(options)
    elif options.step == "report":
        from solar_mega.quickstart.report import write_report

        write_report(options.root, options.seconds)
    elif options.step == "lessons":
        from solar_mega.evaluate.tiny_tasks import write_tiny_tasks
        from solar_mega.quickstart.lessons import write_lessons

        for line in write_lessons(options.root / "lessons") + write_tiny_tasks(options.root / "tasks"):
            say(line)
    else:
        raise UserError(f"quickstart {options.step}: unknown step; allowed: prepare, report, lessons")


def _prepare(options: QuickstartOptions) -> None:
    import json

    from solar_mega.data.train_tokenizer import train_sentencepiece
    from solar_mega.quickstart.corpus import write_corpus

    text = options.root / "text"
    stats = write_corpus(text, max_bytes=options.text_bytes)
    say(
        f"{stats.train_files} source files of Python's standard library, {human_bytes(stats.train_bytes)}; "
        f"{stats.valid_files} more, {human_bytes(stats.valid_bytes)}, for validation"
    )
    config = json.loads(options.model_config.read_text())
    model = options.root / "model"
    shutil.rmtree(model, ignore_errors=True)
    documents = (json.loads(line)["text"] for line in (text / "train.jsonl").open())
    tokenizer = train_sentencepiece(documents, config["vocab_size"], model)
    shutil.copyfile(options.model_config, model / "config.json")
    say(f"SentencePiece tokenizer of {tokenizer.vocab_size} tokens -> {model}")
