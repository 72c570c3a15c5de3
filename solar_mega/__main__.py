"""`solar-mega VERB ...`, also as `python -m solar_mega VERB ...`: finds the verb, runs it, turns errors that
are the user's to mend into one screen of text and exit code 2."""

import difflib
import importlib
import os
import sys
import time
import warnings
from collections.abc import Sequence

from solar_mega import __version__
from solar_mega.errors import ExitCode, UserError

VERBS = {
    "convert": (
        "solar_mega.checkpoint.command:convert",
        "Hugging Face directory <-> Megatron checkpoint, through a layer map",
    ),
    "verify": ("solar_mega.checkpoint.command:verify", "prove that DST is SRC through the map, bit for bit"),
    "inspect": ("solar_mega.checkpoint.command:inspect", "what a checkpoint or model directory holds"),
    "preflight": (
        "solar_mega.runtime.preflight:preflight",
        "do GPUs, collectives and the shared file system work? run by every rank",
    ),
    "plan": ("solar_mega.plan.command:plan", "memory, communication, days and GPU-hours; needs no GPU"),
    "probe": (
        "solar_mega.evaluate.probe_command:probe",
        "what growing by each layer map does to the loss, before writing a model",
    ),
    "tokenize": ("solar_mega.data.command:tokenize", "jsonl, parquet or text -> Megatron .bin/.idx"),
    "tokenizer": ("solar_mega.data.command:tokenizer", "train a SentencePiece tokenizer on text"),
    "pretrain": ("solar_mega.train.command:pretrain", "(continued) pretraining, from a TOML file"),
    "sft": ("solar_mega.align.sft_command:sft", "instruction tuning on conversations, from a TOML file"),
    "dpo": ("solar_mega.align.dpo_command:dpo", "preference optimisation: a DPO step or an sDPO ladder"),
    "evaluate": ("solar_mega.evaluate.command:evaluate", "H6 and other tasks, perplexity, side by side"),
    "contamination": (
        "solar_mega.evaluate.contamination_command:contamination",
        "was a model trained on benchmark texts?",
    ),
    "chat": ("solar_mega.evaluate.chat:chat", "talk to a model in the terminal"),
    "decontaminate": (
        "solar_mega.data.decontaminate:decontaminate",
        "training data without what the benchmarks ask",
    ),
    "synthesize": (
        "solar_mega.data.synthesize_command:synthesize",
        "Synth. Math-Instruct and -Alignment from MATH's problems",
    ),
    "merge": ("solar_mega.merge.command:merge", "merge models: average, SLERP, task arithmetic, TIES, DARE"),
    "plot": ("solar_mega.train.command:plot", "compare runs: losses, gradient norm, speed, memory"),
    "quickstart": ("solar_mega.quickstart.command:quickstart", "the parts of launch/quickstart.sh"),
    "tables": (
        "solar_mega.evaluate.paper_tables:tables",
        "the paper's tables, published figures beside ours",
    ),
    "bench": (
        "solar_mega.bench.command:bench",
        "benchmarks, each beside its peers",
    ),
}
"""Verb -> (`module:function`, one line of help). Imported when called: a verb costs nothing until it is used.
The function takes the words after the verb and returns an exit code (None is 0)."""

USAGE_ERROR = ExitCode.USAGE


def usage() -> str:
    lines = [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: solar-mega VERB [ARGUMENTS]    solar-mega VERB --help",
            "",
            "Grow a language model by depth and train it to the end (SOLAR 10.7B, arXiv 2312.15166).",
            "",
            *lines,
            "",
            "  --version  versions of solar-mega and of what it stands on",
            "",
            "Start here: bash launch/quickstart.sh",
        ]
    )


def versions() -> str:
    """One line per package, read from installed metadata, so nothing heavy is imported."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"solar-mega {__version__}"]
    for package in ("torch", "megatron-core", "transformers"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    return "\n".join(lines + [f"python {sys.version.split()[0]}"])


def run(argv: Sequence[str]) -> int:
    """Runs a verb; errors propagate."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else USAGE_ERROR
    verb, *words = argv
    if verb in ("--version", "-V"):
        print(versions())
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown verb {verb!r}{hint}\nVerbs: {', '.join(VERBS)}. See solar-mega --help")
    module, function = VERBS[verb][0].split(":")
    return getattr(importlib.import_module(module), function)(words) or 0


def report(error: UserError) -> None:
    """Prints the error, in full on one rank only. The others say one line, and give rank 0 a moment: torchrun
    ends everybody as soon as the first process is gone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"solar-mega: {error}", file=sys.stderr, flush=True)
        return
    print(f"solar-mega: rank {rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    time.sleep(1.0)


def _quiet_megatron() -> None:
    """megatron-core warns, on every rank, of each accelerator it does not find. `python -W` overrules."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\.")


EXIT_FILE = "SOLAR_MEGA_EXIT_FILE"
"""Environment variable naming a file for rank 0's exit code: torchrun turns every failure into 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code as `_main` does, and notes it in EXIT_FILE."""
    code = _main(argv)
    if EXIT_FILE in os.environ and os.environ.get("RANK", "0") == "0":
        with open(os.environ[EXIT_FILE], "w") as file:
            file.write(f"{int(code)}\n")
    return code


def _main(argv: Sequence[str] | None) -> int:
    """The exit code; `errors.ExitCode` says what they mean."""
    _quiet_megatron()
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # so that a closed pipe shows here, not at exit
        return code
    except UserError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("solar-mega: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # `solar-mega inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
