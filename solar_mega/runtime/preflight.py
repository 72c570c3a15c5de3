"""`solar-mega preflight`: do the machines work together? Every rank runs it before a training.

- all ranks have the same packages, and each a GPU of its own that nobody else uses, or none has one
- every rank has the accelerators that the training to come asks for
- collectives of all ranks give the right sums, at what speed
- the directory is on a file system that every node sees, and a rename on it is seen by all
"""

import contextlib
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solar_mega import __version__
from solar_mega.config.command_line import RunOptions, parse_options, parse_run
from solar_mega.config.kinds import TRAININGS, config_class
from solar_mega.errors import Problems
from solar_mega.runtime import accelerators
from solar_mega.runtime.console import human_bytes, human_seconds, say, table

BUSY = 0.05
"""Share of a GPU's memory in use above which somebody else is on it."""


PATIENCE = 5.0
"""Seconds after which a file that another node wrote must be seen; network file systems cache names."""


@dataclass(frozen=True)
class PreflightOptions:
    """Check GPUs, collectives and the shared file system with all ranks of a job. Start it as a training is
    started (torchrun, srun): exit code 2 and every problem found, by host and rank. The words of the training
    to come may follow a lone `--`: its configuration is read, and its accelerators are looked for."""

    dir: Path = Path(".")
    """Directory that all nodes must share."""

    payload_mib: int = 64
    """Size of the all-reduces whose speed is measured."""

    rounds: int = 5
    """All-reduces measured."""


@dataclass(frozen=True)
class Rank:
    """What a rank says of itself."""

    rank: int
    host: str
    versions: str
    device: str
    """The GPU's name, or `CPU`."""

    device_id: str
    """Distinguishes GPUs of a host; the local rank on a CPU."""

    used: float
    """Share of the GPU's memory in use."""

    lacks: tuple[str, ...] = ()
    """Accelerators of the training to come that are not here."""


def preflight(argv: Sequence[str]) -> int:
    """`solar-mega preflight --dir DIR [-- VERB ARGUMENTS]`"""
    options, training = _read(argv)
    from solar_mega.runtime import parallel

    started = time.monotonic()
    me = describe_rank(training)
    parallel.join_world()
    try:
        ranks = parallel.gather(me)
        problems = Problems()
        for text in compare(ranks):
            problems.add(text)
        problems.raise_if_any("preflight")  # collectives would hang or mislead
        speed = _all_reduce(options, problems)
        _shared_directory(options.dir, ranks, problems)
        problems.raise_if_any("preflight")
    finally:
        parallel.stop()
    say(_report(ranks, options, speed, time.monotonic() - started))
    return 0


def _read(argv: Sequence[str]) -> tuple[PreflightOptions, Any]:
    """The options, and the configuration of the training to come where its words follow a lone `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    options = parse_options(PreflightOptions, argv[:end], "preflight")
    verb, *words = argv[end + 1 :] or [""]
    if verb not in TRAININGS:
        return options, None
    return options, parse_run(RunOptions, config_class(verb), words, verb)[1]


def describe_rank(training: Any = None) -> Rank:
    """What this process has; `training` is a configuration that may ask for accelerators."""
    import torch

    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    host, device, device_id, used = socket.gethostname(), "CPU", str(local), 0.0
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local >= count:
            device, device_id = f"missing: local rank {local} of {count} visible GPUs", f"missing {local}"
        else:
            properties = torch.cuda.get_device_properties(local)
            free, total = torch.cuda.mem_get_info(local)
            device, device_id = properties.name, str(getattr(properties, "uuid", local))
            used = 1 - free / total
    wanted = accelerators.needs(training.parallel, training.kernels) if hasattr(training, "kernels") else []
    lacks = accelerators.missing(wanted, accelerators.this_device()) if wanted else []
    return Rank(rank, host, _versions(), device, device_id, used, tuple(lacks))


def _versions() -> str:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = [f"solar-mega {__version__}", f"python {platform.python_version()}"]
    for package in ("torch", "megatron-core", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    for package in ("transformer-engine", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def compare(ranks: Sequence[Rank]) -> list[str]:
    """What is wrong with the ranks side by side."""
    found = []
    for what in ("versions", "device"):
        groups: dict[str, list[Rank]] = defaultdict(list)
        for rank in ranks:
            groups[getattr(rank, what)].append(rank)
        missing = [name for name in groups if name.startswith("missing")]
        if len(groups) > 1 or missing:
            listed = "; ".join(f"{name} on {_places(group)}" for name, group in groups.items())
            found.append(f"the ranks differ in {what}: {listed}")
    owners: dict[tuple[str, str], list[Rank]] = defaultdict(list)
    for rank in ranks:
        owners[rank.host, rank.device_id].append(rank)
    for (host, device), group in owners.items():
        if len(group) > 1 and group[0].device != "CPU":
            found.append(f"{host}: ranks {', '.join(str(r.rank) for r in group)} share the GPU {device}")
    lacking: dict[str, list[Rank]] = defaultdict(list)
    for rank in ranks:
        for text in rank.lacks:
            lacking[text].append(rank)
    found += [f"{_places(group)}: {text}" for text, group in lacking.items()]
    for rank in ranks:
        if rank.used > BUSY:
            found.append(
                f"{rank.host}, rank {rank.rank}: {rank.used:.0%} of the GPU's memory is already used"
            )
    return found


def _places(ranks: Sequence[Rank]) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        hosts[rank.host].append(rank.rank)
    return ", ".join(f"{host} (ranks {', '.join(map(str, numbers))})" for host, numbers in hosts.items())


def _all_reduce(options: PreflightOptions, problems: Problems) -> float:
    """Bytes/s that a rank sends in a ring of all; wrong sums go to `problems`. Collective."""
    import torch
    import torch.distributed as dist

    from solar_mega.runtime import parallel

    world, rank = parallel.world_size(), parallel.rank()
    values = torch.empty(options.payload_mib * 2**18, device=parallel.device())
    wrong, seconds = False, []
    for _ in range(options.rounds + 1):  # the first one also connects
        values.fill_(rank + 1)
        dist.barrier(group=parallel.control_group())
        began = time.perf_counter()
        dist.all_reduce(values)
        wrong = not bool((values == world * (world + 1) / 2).all()) or wrong  # waits for the device
        seconds.append(time.perf_counter() - began)
    for other, bad in enumerate(parallel.gather(wrong)):
        if bad:
            problems.add(f"rank {other}: an all-reduce gave wrong sums")
    sent = 2 * (world - 1) / world * values.nbytes
    return sent / min(seconds[1:])


def _shared_directory(directory: Path, ranks: Sequence[Rank], problems: Problems) -> None:
    """Rank 0 writes and renames, all read; all write, rank 0 reads. Collective."""
    from solar_mega.runtime import parallel

    token, rank = parallel.gather(secrets.token_hex(8))[0], parallel.rank()
    name = f".preflight-{token}"
    error = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}-{rank}").write_text(token)
        if rank == 0:
            (directory / f"{name}-new").write_text(token)
            (directory / f"{name}-new").rename(directory / name)
    except OSError as raised:
        error = f"cannot be written: {raised.strerror}"
    errors = parallel.gather(error)
    if not any(errors):
        errors = parallel.gather(_seen(directory, name, token, [r.rank for r in ranks] if rank == 0 else []))
    for other, text in zip(ranks, errors, strict=True):
        if text:
            problems.add(f"--dir {directory}: {text} (rank {other.rank} on {other.host})")
    with contextlib.suppress(OSError):
        (directory / f"{name}-{rank}").unlink(missing_ok=True)
        if rank == 0:
            (directory / name).unlink(missing_ok=True)


def _seen(directory: Path, name: str, token: str, others: Sequence[int]) -> str | None:
    """What this rank misses."""
    wanted = {directory / name, *(directory / f"{name}-{other}" for other in others)}
    deadline = time.monotonic() + PATIENCE
    while True:
        absent = sorted(str(path) for path in wanted if not path.exists() or path.read_text() != token)
        if not absent:
            return None
        if time.monotonic() > deadline:
            return f"not shared: {', '.join(absent[:3])}, written by another rank, cannot be seen"
        time.sleep(0.2)


def _report(ranks: Sequence[Rank], options: PreflightOptions, speed: float, seconds: float) -> str:
    hosts: dict[str, list[Rank]] = defaultdict(list)
    for rank in ranks:
        hosts[rank.host].append(rank)
    rows = [(host, len(group), group[0].device) for host, group in hosts.items()]
    payload = human_bytes(options.payload_mib * 2**20)
    fast = "" if len(ranks) == 1 else f"; all-reduce of {payload}: {human_bytes(speed)}/s sent by each rank"
    return (
        f"{table(rows, ('host', 'ranks', 'device'))}\n{asdict(ranks[0])['versions']}\n"
        f"preflight: {len(ranks)} ranks work together{fast}; {options.dir} is shared "
        f"({human_seconds(seconds)})"
    )
