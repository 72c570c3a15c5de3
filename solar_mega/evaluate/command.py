"""`solar-mega evaluate`: H6 and other tasks, perplexity; several models side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.console import say

if TYPE_CHECKING:
    from solar_mega.evaluate.report import ModelResult


HF_BATCH = 8  # sequences, of the harness's own model


@dataclass(frozen=True)
class EvaluateOptions:
    """Score models on the paper's six tasks (H6) or others, through lm-evaluation-harness, and measure
    perplexity. Each model may be a Hugging Face directory, a Megatron checkpoint or a run's directory;
    started with torchrun, the ranks share it, as --tp and --pp say, and the rest are replicas."""

    models: Positional[tuple[Path, ...]] = ()
    """Hugging Face directories, Megatron checkpoints or runs' directories."""

    config: Path | None = None
    """TOML file with any of these settings; the command line wins."""

    preset: str = "leaderboard-v1"
    """leaderboard-v1: as the paper's leaderboard of 2023 did; lm-eval: today's defaults."""

    tasks: tuple[str, ...] | None = None
    """Tasks; default: the six of H6, or none with --text. Other names are looked up in the harness."""

    data: Path | None = None
    """Directory with the tasks' data, DATA/arc_challenge/test.jsonl and so on; default: the hub."""

    out: Path = Path("runs/evaluate")
    """Results; finished tasks there are not run again."""

    tp: int = 1
    """Tensor-parallel ranks that share a model."""

    pp: int = 1
    """Pipeline stages that share a model."""

    backend: Literal["auto", "megatron", "hf"] = "auto"
    """megatron: our model; hf: the harness's own transformers model, on one process; auto: ours where it
    knows the architecture."""

    precision: Literal["fp32", "bf16"] | None = None
    """Default: that of the weights."""

    limit: int | None = None
    """Only the first questions of every task, for trying things out."""

    max_length: int | None = None
    """Context in tokens; default: the model's own."""

    batch_tokens: int | None = None
    """Tokens computed together; default: 1024 on a CPU, 8192 on a GPU."""

    apply_chat_template: bool = False
    """Put the questions into the model's chat template."""

    log_samples: bool = False
    """Keep every question with the model's answers."""

    text: tuple[str, ...] | None = None
    """Texts (.txt, .jsonl, .parquet) to measure perplexity on."""

    key: str = "text"
    """JSON key or parquet column of --text."""

    stride: int | None = None
    """Tokens by which the windows of --text move on; default: half the context."""

    make_data: Path | None = None
    """Write small self-made task files to this directory, and stop."""


def evaluate(argv: Sequence[str]) -> int:
    options = parse_options(EvaluateOptions, argv, "evaluate")
    if options.make_data is not None:
        from solar_mega.evaluate.tiny_tasks import write_tiny_tasks

        for line in write_tiny_tasks(options.make_data):
            say(line)
        return 0
    prepare_harness()
    run(options)
    return 0


def prepare_harness() -> None:
    """Keeps the harness and its libraries, which narrate what they do, off the console; before their first
    import. Raises UserError when the extra is not installed."""
    import importlib.util
    import logging
    import os

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation needs lm-eval, which is not installed: pip install 'solar-mega[eval]'")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets", "httpx", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run(options: EvaluateOptions) -> "list[ModelResult]":
    """Every rank calls this; the results are on rank 0. Raises UserError."""
    from solar_mega.evaluate.report import ModelResult, console_table, write_report
    from solar_mega.runtime import parallel as ranks

    job = Job(options)
    done: dict[Path, ModelResult] = {}

    def finished(path: Path, result: ModelResult | None) -> None:
        if result is not None:
            done[path] = result
            if len(done) < len(options.models):
                write_report([done[path] for path in options.models if path in done], options.out, False)

    # transformers' loading asks torch.cuda what Megatron on CPUs answers in its own way, so it goes first.
    for path in job.paths("hf"):
        finished(path, job.evaluate_hf(path))
    if job.paths("megatron"):
        with ranks.running(ParallelConfig(tp=options.tp, pp=options.pp)):
            for path in job.paths("megatron"):
                finished(path, job.evaluate(path))
    results = [done[path] for path in options.models if path in done]
    if results:
        say("\n" + console_table(results))
        say(f"\n{', '.join(str(path) for path in write_report(results, options.out))}")
    return results


class Job:
    """The command line, checked: what to run on which models."""

    def __init__(self, options: EvaluateOptions) -> None:
        from solar_mega.evaluate.run import Evaluation, Settings
        from solar_mega.evaluate.task_files import find_task_files
        from solar_mega.evaluate.tasks import plan_tasks

        _check(options)
        self.options = options
        self.names = model_names(options.models)
        self.kinds = {path: self._backend(path) for path in options.models}
        self.evaluation = None
        wanted = options.tasks if options.tasks is not None or options.text is None else None
        if wanted is not None or options.text is None:
            plans = plan_tasks(wanted or (), options.preset)
            files = find_task_files(options.data, plans) if options.data is not None else None
            settings = Settings(
                options.preset, options.limit, options.apply_chat_template, options.log_samples
            )
            self.evaluation = Evaluation(plans, files, settings)
        self.documents = _read_texts(options) if options.text else None

    def _backend(self, path: Path) -> str:
        from solar_mega.data.tokenizer import check_vocabulary, load_tokenizer
        from solar_mega.evaluate.model import prepare
        from solar_mega.runtime import parallel as ranks

        chosen, parallel = self.options.backend, ParallelConfig(tp=self.options.tp, pp=self.options.pp)
        if chosen != "hf":
            try:
                ranks.check_world_size(parallel, ranks.world_size())
                source, arch = prepare(path, parallel)
                check_vocabulary(load_tokenizer(source.side_files), arch.vocab_size, str(path))
                return "megatron"
            except UserError as error:
                plain = (path / "config.json").is_file() and ranks.world_size() == 1
                if chosen == "megatron" or not plain or "is not supported" not in str(error):
                    raise
        elif ranks.world_size() > 1:
            raise UserError("--backend hf runs on one process; start it without torchrun")
        elif not (path / "config.json").is_file():
            raise UserError(f"--backend hf: {path} is no Hugging Face directory, it has no config.json")
        return "hf"

    def evaluate(self, path: Path) -> "ModelResult | None":
        """The result of our model on rank 0, None elsewhere. Collective."""
        from solar_mega.evaluate.harness import ShardedLM
        from solar_mega.evaluate.model import opened

        say(f"{self.names[path]}: {path}")
        o = self.options
        with opened(path, ParallelConfig(tp=o.tp, pp=o.pp), o.precision) as model:
            if not model.leads:
                return None
            lm = ShardedLM(model, o.max_length, o.batch_tokens)
            scores = self._scores(lm, path)
            return self._result(path, scores, self._perplexity(model, lm))

    def paths(self, kind: str) -> list[Path]:
        return [path for path in self.options.models if self.kinds[path] == kind]

    def evaluate_hf(self, path: Path) -> "ModelResult":
        """The result of the harness's own transformers model."""
        import torch
        from lm_eval.models.huggingface import HFLM

        say(f"{self.names[path]}: {path}, by the harness's own transformers model")
        o = self.options
        if self.documents is not None:
            raise UserError(f"--text {path}: perplexity needs one of our families; not with --backend hf")
        names = {None: "auto", "fp32": "float32", "bf16": "bfloat16"}
        lm = HFLM(
            pretrained=str(path),
            batch_size=HF_BATCH,
            dtype=names[o.precision],
            max_length=o.max_length,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return self._result(path, self._scores(lm, path), None)

    def _scores(self, lm: Any, path: Path) -> list:
        from solar_mega.evaluate.run import fingerprint

        if self.evaluation is None:
            return []
        o = self.options
        key = f"{fingerprint(path)} {self.kinds[path]} {o.precision} {o.max_length}"
        return self.evaluation.run(lm, o.out / self.names[path], key)

    def _perplexity(self, model: Any, lm: Any) -> dict[str, Any] | None:
        if self.documents is None:
            return None
        from solar_mega.evaluate.perplexity import text_perplexity

        encoded = [(lm.tok_encode(t, add_special_tokens=False), len(t.encode())) for t in self.documents]
        result = text_perplexity(model, encoded, lm.prefix_token_id, self.options.stride)
        say(
            f"  perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte "
            f"({result.tokens} tokens of {result.documents} documents)"
        )
        return asdict(result)

    def _result(self, path: Path, scores: list, perplexity: dict[str, Any] | None) -> "ModelResult":
        from importlib.metadata import version

        from solar_mega.evaluate.report import ModelResult

        o = self.options
        facts = {
            "preset": o.preset,
            "limit": o.limit,
            "backend": self.kinds[path],
            "lm_eval": version("lm-eval"),
            "data": None if o.data is None else str(o.data),
        }
        return ModelResult(self.names[path], str(path), tuple(scores), perplexity, facts)


def _check(o: EvaluateOptions) -> None:
    problems = Problems()
    if not o.models:
        problems.add("no models given; name Hugging Face directories or checkpoints")
    if len(set(o.models)) < len(o.models):
        problems.add("a model is given twice")
    for name in ("limit", "max_length", "batch_tokens", "tp", "pp"):
        value = getattr(o, name)
        if value is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    problems.raise_if_any("evaluate")


def model_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A short and different name for each: the last parts of the path that tell it from the others."""
    parts = {path: [p for p in path.resolve().parts[1:] if p != "hf"] or ["root"] for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names[path] = "-".join(own[-length:])
    if len(set(names.values())) < len(names):  # a run and its hf directory
        names = {path: "-".join(path.resolve().parts[-3:]) for path in paths}
    return names


def _read_texts(o: EvaluateOptions) -> list[str]:
    from solar_mega.data.documents import cut_into_pieces
    from solar_mega.data.sources import ReadOptions, check_sources, find_sources

    reading = ReadOptions(o.key)
    sources = find_sources(o.text or ())
    check_sources(sources, reading)
    found, problems = [], Problems()
    for piece in cut_into_pieces(sources, reading):
        for record in piece.records(reading):
            if isinstance(record, str):
                found.append(record)
            else:
                problems.add(record.describe())
    problems.raise_if_any("--text")
    return found
