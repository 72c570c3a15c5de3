"""The merge itself: tensors in parallel on a few threads, each streamed chunk by chunk from the models to its
place in the result.

Memory does not grow with the model: a thread has a window on each input and a chunk of the result. Parents
are hashed beside the work (`merge.parents`).
"""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from solar_mega.artifact.card import merge_card
from solar_mega.artifact.hf import write_config
from solar_mega.artifact.lineage import Parent, write_lineage
from solar_mega.artifact.progress import Advances, ProgressFactory, silent
from solar_mega.artifact.safetensors_reader import as_bytes
from solar_mega.artifact.safetensors_writer import SHARD_BYTES, ShardedWriter
from solar_mega.errors import UserError
from solar_mega.merge.arithmetic import Findings, merge_tensor
from solar_mega.merge.chunks import Stream
from solar_mega.merge.parents import Parents
from solar_mega.merge.plan import Job, MergePlan
from solar_mega.runtime.cores import available_cores
from solar_mega.runtime.files import atomic_directory, require_empty, require_space

REPORT = "merge_report.json"
_SPARE = 16 << 20  # bytes beside the weights: headers, index, tokenizer, reports


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote."""

    path: Path
    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    findings: Findings


def merge(
    plan: MergePlan,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    progress: ProgressFactory = silent,
    parents: Parents | None = None,
) -> MergeReport:
    """Writes the merged model as the directory `out`: weights, config, tokenizer and side files of the
    reference, lineage.json naming every parent, a model card, and for SLERP `merge_report.json` with the
    angle of each tensor. `out` appears only when complete; the models are only read.

    Args:
        threads: CPU threads; None: all cores of this process.
        parents: of the same models, where hashing them began before.

    Raises:
        UserError: `out` not empty or inside a model, too little space, a full disk, NaN or infinite weights.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    check_place(plan, out)
    findings = Findings()
    with parents or Parents(plan.recipe.models) as known, atomic_directory(out) as partial:
        known.follow(plan)
        _write_weights(plan, partial, shard_bytes, threads or available_cores(), progress, findings, known)
        _write_surroundings(plan, partial, out.name, findings, known.done(plan))
    return MergeReport(
        out, len(plan.jobs), plan.parameters, plan.nbytes, time.monotonic() - started, findings
    )


def check_place(plan: MergePlan, out: Path) -> None:
    """Raises UserError when the result cannot be written to `out`."""
    require_empty(out, "--out")
    for path in plan.models:
        if path.resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out: {out} lies inside the model {path}; name a directory outside it")
    require_space(out, plan.nbytes + _SPARE)


def _write_weights(
    plan: MergePlan,
    directory: Path,
    shard_bytes: int,
    threads: int,
    progress: ProgressFactory,
    findings: Findings,
    parents: Parents,
) -> None:
    stop = threading.Event()
    for job in plan.jobs:  # opened here: readers open files on demand, and are not made for races
        for origin in job.origins:
            origin.reader.open(origin.info.name)
    with (
        ShardedWriter(directory, shard_bytes) as writer,
        progress(plan.nbytes, "bytes", "merge") as line,
        _one_torch_thread(),
    ):
        writer.plan([(job.name, job.dtype, job.shape) for job in plan.jobs])

        def work(job: Job) -> None:
            with parents.merging(sum(origin.info.nbytes for origin in job.origins)):
                stream = Stream(job, stop.is_set)
                chunks = merge_tensor(plan.recipe.method, stream, plan.recipe.seed, findings)
                writer.write_chunks(job.name, _bytes(chunks, line))

        pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        try:
            _wait([pool.submit(work, job) for job in plan.jobs])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for model in plan.models.values():
        model.tensors.close()


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


def _bytes(chunks: Iterator[torch.Tensor], line: Advances) -> Iterator[memoryview]:
    for chunk in chunks:
        data = as_bytes(chunk)
        yield data
        line.advance(len(data))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Tensors are the parallelism; chunks are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_surroundings(
    plan: MergePlan, place: Path, name: str, findings: Findings, parents: list[Parent]
) -> None:
    recipe = plan.recipe
    reference = plan.models[recipe.reference]
    reference.copy_side_files(place)
    write_config(place, plan.config)
    if findings.angles:
        (place / REPORT).write_text(json.dumps(_angles(plan, findings), indent=2) + "\n", "utf-8")
    card = merge_card(
        name,
        recipe.method,
        [path.resolve().name for path in plan.models],
        reference.architecture,
        plan.layers,
        plan.parameters,
        json.dumps(recipe.written, indent=2),
    )
    (place / "README.md").write_text(card, "utf-8")
    config = {"method": recipe.method, "recipe": dict(recipe.written)}
    write_lineage(place, f"merge --method {recipe.method}", parents, None, config)


def _angles(plan: MergePlan, findings: Findings) -> dict[str, Any]:
    """By tensor, in the order of the model, whatever the threads' order was."""
    places = {job.name: number for number, job in enumerate(plan.jobs)}
    ordered = sorted(findings.angles, key=lambda angle: places[angle.name])
    return {
        "method": plan.recipe.method,
        "lerp_tensors": sum(angle.lerp for angle in ordered),
        "tensors": [{**asdict(angle), "theta_radians": angle.theta} for angle in ordered],
    }
