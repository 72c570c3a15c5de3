"""The merge itself: tensors in parallel on a few threads, each streamed chunk by chunk from the models to its
place in the result.

Memory does not grow with the model: a thread holds one chunk per input. Parents are hashed beside the work,
paced so that the hash and the merge read the same part of the files at about the same time, and the disk
delivers it once.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from solar_mega.artifact.card import merge_card
from solar_mega.artifact.hf import write_config
from solar_mega.artifact.lineage import Parent, directory_hash, write_lineage
from solar_mega.artifact.progress import Advances, ProgressFactory, silent
from solar_mega.artifact.safetensors_format import torch_dtype
from solar_mega.artifact.safetensors_reader import as_bytes
from solar_mega.artifact.safetensors_writer import SHARD_BYTES, ShardedWriter
from solar_mega.checkpoint.to_hf import parent_of
from solar_mega.errors import UserError
from solar_mega.merge.arithmetic import CHUNK, Findings, Stream, merge_tensor
from solar_mega.merge.models import MegatronModel
from solar_mega.merge.plan import Job, MergePlan
from solar_mega.runtime.files import atomic_directory, require_empty, require_space

REPORT = "merge_report.json"
_SPARE = 16 << 20  # bytes beside the weights: headers, index, tokenizer, reports
_AHEAD = 1 << 30  # bytes by which hashing a parent may run ahead of merging it
_HASH_CHUNK = 4 << 20  # what directory_hash reads between two questions whether to stop


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
) -> MergeReport:
    """Writes the merged model as the directory `out`: weights, config, tokenizer and side files of the
    reference, lineage.json naming every parent, a model card, and for SLERP `merge_report.json` with the
    angle of each tensor. `out` appears only when complete; the models are only read.

    Args:
        threads: CPU threads; None: all cores of this process.

    Raises:
        UserError: `out` not empty or inside a model, too little space, a full disk, NaN or infinite weights.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    check_place(plan, out)
    findings = Findings()
    with _Parents(plan) as parents, atomic_directory(out) as partial:
        _write_weights(plan, partial, shard_bytes, threads or _cores(), progress, findings, parents)
        _write_surroundings(plan, partial, out.name, findings, parents.done())
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_weights(
    plan: MergePlan,
    directory: Path,
    shard_bytes: int,
    threads: int,
    progress: ProgressFactory,
    findings: Findings,
    parents: "_Parents",
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
            stream = Stream(job.origins, stop.is_set)
            chunks = merge_tensor(plan.recipe.method, job, stream, plan.recipe.seed, findings)
            writer.write_chunks(job.name, _stored(job, chunks, line))
            parents.merged(sum(origin.info.nbytes for origin in job.origins))

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


def _stored(job: Job, chunks: Iterator[torch.Tensor], line: Advances) -> Iterator[memoryview]:
    """Chunks cast once to the dtype on disk. Raises UserError for values that are not finite, or would not be
    in that dtype."""
    dtype = torch_dtype(job.dtype)
    done = 0
    for chunk in chunks:
        stored = chunk.to(dtype)
        # A sum is as good as looking at every element, and needs no mask: NaN and infinity survive it.
        if not torch.isfinite(chunk.sum() if job.dtype != "F16" else stored.float().sum()):
            _refuse_values(job, done, chunk, stored)
        data = as_bytes(stored)
        yield data
        line.advance(len(data))
        done += CHUNK


def _refuse_values(job: Job, start: int, chunk: torch.Tensor, stored: torch.Tensor) -> None:
    bad = ~torch.isfinite(stored)
    if not bad.any():
        return  # many large values: only their sum is beyond fp32
    element = start + int(bad.nonzero()[0])
    if torch.isfinite(chunk[bad]).all():
        raise UserError(
            f"{job.name}: merged values up to {chunk.abs().max():g}, more than {job.dtype} holds; use --dtype"
        )
    sources = ", ".join(str(origin.reader.directory) for origin in job.origins)
    raise UserError(f"{job.name}: element {element} is not finite after merging; look for NaN in {sources}")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Tensors are the parallelism; chunks are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Parents:
    """Content hashes of all models, computed beside the merge; checkpoints are known by their run state."""

    def __init__(self, plan: MergePlan) -> None:
        self.paths = list(plan.models)
        self.checkpoints = {
            path: model.checkpoint for path, model in plan.models.items() if isinstance(model, MegatronModel)
        }
        self.stop = threading.Event()
        total = sum(origin.info.nbytes for job in plan.jobs for origin in job.origins)
        on_disk = sum(model.tensors.total_bytes for model in plan.models.values())
        self.share = on_disk / max(1, total) / len(self.paths)
        self.read = 0.0
        self.lock = threading.Lock()

    def __enter__(self) -> "_Parents":
        self.pool = ThreadPoolExecutor(len(self.paths), thread_name_prefix="hash")
        self.hashes = {
            path: self.pool.submit(directory_hash, path, self._pace())
            for path in self.paths
            if path not in self.checkpoints
        }
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown()

    def merged(self, nbytes: int) -> None:
        """`nbytes` of the inputs, over all models, have been merged."""
        with self.lock:
            self.read += nbytes * self.share

    def _pace(self) -> Callable[[], bool]:
        hashed = 0

        def stopped() -> bool:
            nonlocal hashed
            hashed += _HASH_CHUNK
            while hashed > self.read + _AHEAD and not self.stop.is_set():
                time.sleep(0.01)
            return self.stop.is_set()

        return stopped

    def done(self) -> list[Parent]:
        """All parents; the merge is over, so nothing has to wait for it any more."""
        self.read = float("inf")
        return [
            parent_of(self.checkpoints[path])
            if path in self.checkpoints
            else Parent.of(path, self.hashes[path].result())
            for path in self.paths
        ]


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
