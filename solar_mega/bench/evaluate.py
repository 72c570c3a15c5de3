"""`solar-mega bench evaluate`: the paper's tasks by our model and by lm-evaluation-harness's own transformers
model, in one process, task by task in turns.

Timed is the model's part alone (tokenising, batching, forward passes, generation), not the harness's
building of prompts and metrics, which both share. Scores must agree, or there is nothing to compare.
"""

import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solar_mega.errors import UserError
from solar_mega.runtime.console import say, table


@dataclass(frozen=True)
class EvaluateBench:
    """Throughput of evaluation on the tasks of H6 with their few-shot examples, ours beside the harness's own
    model, paired in one run."""

    model: Path | None = None
    """Hugging Face directory; default: random weights of the shape below."""
    data: Path | None = None
    """Task files; default: the self-made ones."""
    tasks: tuple[str, ...] = ()
    """Default: all six."""
    limit: int | None = None
    """Questions per task."""
    rounds: int = 3
    """Times that every task is run by each."""
    layers: int = 8
    hidden: int = 256
    vocab: int = 2048
    max_length: int = 2048
    """Positions of the model."""
    hf_batch: int = 8
    """Sequences in a batch of the harness's model."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    out: Path | None = None
    """Write the result as JSON to this file."""


def run(o: EvaluateBench) -> dict[str, Any]:
    """Prints a table, returns (and writes) the result. Raises UserError when the two disagree."""
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.runtime import parallel as ranks

    with tempfile.TemporaryDirectory() as folder:
        model, data = o.model or _make_model(o, Path(folder)), o.data or _make_data(Path(folder))
        # transformers loads before Megatron's CPU adapter is there; see evaluate's command.
        theirs = _their_model(model, o)
        with ranks.running(ParallelConfig(), threads=o.threads):
            return _report(_measure(o, model, data, theirs), o)


def _make_model(o: EvaluateBench, folder: Path) -> Path:
    import torch
    import transformers

    from solar_mega.data.train_tokenizer import train_sentencepiece

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = (path.read_text("utf-8") for path in sorted(library.glob("*.py"))[:40])
    train_sentencepiece(texts, o.vocab, folder / "model", max_bytes=500_000)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        intermediate_size=3 * o.hidden,
        num_hidden_layers=o.layers,
        num_attention_heads=max(1, o.hidden // 64),
        num_key_value_heads=max(1, o.hidden // 128),
        max_position_embeddings=o.max_length,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model"


def _make_data(folder: Path) -> Path:
    from solar_mega.evaluate.tiny_tasks import write_tiny_tasks

    write_tiny_tasks(folder / "tasks")
    return folder / "tasks"


def _their_model(model: Path, o: EvaluateBench) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(pretrained=str(model), batch_size=o.hf_batch, dtype="auto", device=device)


def _measure(o: EvaluateBench, model: Path, data: Path, theirs: Any) -> dict[str, dict[str, Any]]:
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.evaluate.harness import ShardedLM
    from solar_mega.evaluate.model import opened
    from solar_mega.evaluate.run import Evaluation, Settings
    from solar_mega.evaluate.task_files import find_task_files
    from solar_mega.evaluate.tasks import plan_tasks

    plans = plan_tasks(o.tasks, "leaderboard-v1")
    evaluation = Evaluation(
        plans, find_task_files(data, plans), Settings("leaderboard-v1", o.limit, False, False)
    )
    measured: dict[str, dict[str, Any]] = {}
    with opened(model, ParallelConfig()) as ours:
        lms = {"solar_mega": ShardedLM(ours), "hf": theirs}
        for plan in plans:
            row = measured[plan.title] = {"seconds": {name: [] for name in lms}, "scores": {}}
            for number in range(o.rounds):
                for name in list(lms)[:: 1 if number % 2 else -1]:
                    with tempfile.TemporaryDirectory() as fresh, _timed(lms[name]) as seconds:
                        (score,) = evaluation.run_quietly([plan], lms[name], Path(fresh), name)
                    row["seconds"][name].append(sum(seconds))
                    row["scores"][name] = score.value
            row["questions"] = score.questions
    return measured


@contextmanager
def _timed(lm: Any) -> Iterator[list[float]]:
    """Seconds of every request list the harness hands to `lm`."""
    seconds: list[float] = []
    names = ("loglikelihood", "generate_until")

    def timed(answer: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = answer(*args, **options)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    for name in names:
        setattr(lm, name, timed(getattr(lm, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(lm, name)


def _report(measured: dict[str, dict[str, Any]], o: EvaluateBench) -> dict[str, Any]:
    import torch

    rows, tasks = [], {}
    for title, row in measured.items():
        ours, theirs = row["seconds"]["solar_mega"], row["seconds"]["hf"]
        if abs(row["scores"]["solar_mega"] - row["scores"]["hf"]) > 1e-6:
            raise UserError(f"{title}: the scores differ, {row['scores']}; the times would mean nothing")
        ratio = statistics.median(t / mine for t, mine in zip(theirs, ours, strict=True))
        tasks[title] = {
            "questions": row["questions"],
            "ours_seconds": round(statistics.median(ours), 3),
            "hf_seconds": round(statistics.median(theirs), 3),
            "ours_is_x_times_as_fast": round(ratio, 3),
            "score": row["scores"]["hf"],
        }
        rows.append(
            (title, row["questions"], *(f"{statistics.median(t):.2f}" for t in (ours, theirs)), ratio)
        )
    whole = sum(t["hf_seconds"] for t in tasks.values()) / sum(t["ours_seconds"] for t in tasks.values())
    cells = [(*row[:-1], f"{row[-1]:.2f}") for row in rows]
    say(table(cells, ("task", "questions", "ours s", "hf s", "ours is x times as fast")))
    say(f"all tasks: {whole:.2f} times as fast")
    shape = {key: str(v) if isinstance(v, Path) else v for key, v in vars(o).items() if key != "out"}
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": shape,
        "tasks": tasks,
        "all_tasks_ours_is_x_times_as_fast": round(whole, 3),
    }
    if o.out is not None:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        o.out.write_text(json.dumps(result, indent=2) + "\n")
    return result
