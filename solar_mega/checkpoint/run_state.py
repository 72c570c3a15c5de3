"""What a Megatron checkpoint says about itself in JSON: the run's position, and which files must be there.

`run_state.json` is written last, so that a checkpoint without it is not one. Reading it needs no model, no
process groups and no torch.
"""

import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from solar_mega.errors import Problems, UserError
from solar_mega.runtime.files import sha256

RUN_STATE = "run_state.json"
_FORMAT = "solar_mega megatron checkpoint"
_VERSION = 1
_SHOWN = 12


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its weights, optimizer states and random generators. All values fit in
    JSON.
    """

    step: int
    """Optimizer steps done."""

    consumed_samples: int
    """Samples drawn from the training data: the data position."""

    consumed_tokens: int

    schedule: dict[str, Any]
    """State of the learning-rate schedule."""

    hf_config: dict[str, Any]
    """config.json of the model in this checkpoint, at its own depth."""

    config_toml: str
    """The run's resolved configuration."""

    parallel: dict[str, Any]
    """Layout it was saved on: tp, pp, vpp, dp. Any other layout may load it."""

    source: str
    """Directory that tokenizer and other side files of an export come from."""

    lineage: dict[str, Any]
    """Parents, layer map, versions; see artifact.lineage."""

    seed: int = 1234
    """Base seed of the run; random streams are derived from it anew where the layout has changed."""


def write_run_state(directory: Path, state: RunState, hashes: dict[str, str] | None = None) -> None:
    """Writes `run_state.json` with the names and sizes of everything else in `directory`. Call when all is
    written.

    `hashes`: SHA-256 of files whose content was hashed as it was written; the others are read. None keeps no
    hashes.
    """
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.is_file()}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "state": asdict(state),
        "files": sizes,
        "versions": _versions(),
    }
    if hashes is not None:
        content["sha256"] = {name: hashes.get(name) or sha256(directory / name) for name in sizes}
    (directory / RUN_STATE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_run_state(path: Path | str) -> RunState:
    """Raises UserError when `path` is not a complete checkpoint of this project."""
    return _state(_read(Path(path)), Path(path))


def file_hashes(path: Path | str) -> dict[str, str] | None:
    """SHA-256 of the data files as they were written; None for a checkpoint saved without. What a conversion
    writes anew under an old name is not among them."""
    hashes = _read(Path(path)).get("sha256")
    return None if not hashes else {name: hash for name, hash in hashes.items() if name.endswith(".distcp")}


def check_files(path: Path | str) -> None:
    """Every file the checkpoint was committed with is there at its full size.

    Raises UserError naming all that are missing or cut.
    """
    path = Path(path)
    problems = Problems()
    for name, size in _read(path)["files"].items():
        file = path / name
        if not file.is_file():
            problems.add(f"{name} is missing ({size} bytes)")
        elif file.stat().st_size != size:
            problems.add(f"{name} has {file.stat().st_size} bytes; it was written with {size}")
    _raise(problems, path)


def check_hashes(path: Path | str, part: int = 0, parts: int = 1) -> None:
    """Reads the checkpoint's files and compares their SHA-256 with what was written. Files are dealt out to
    `parts` readers, the largest first; this one takes share number `part`. Nothing is read where the
    checkpoint was saved without hashes.

    Raises UserError naming all files that differ.
    """
    path = Path(path)
    content = _read(path)
    problems = Problems()
    hashes = content.get("sha256", {})
    for name in sorted(hashes, key=lambda name: -content["files"][name])[part::parts]:
        if sha256(path / name) != hashes[name]:
            problems.add(f"{name} does not hold what was written to it (its SHA-256 differs)")
    _raise(problems, path)


def _raise(problems: Problems, path: Path) -> None:
    if len(problems.texts) > _SHOWN:
        problems.texts[_SHOWN:] = [f"... and {len(problems.texts) - _SHOWN} more"]
    problems.raise_if_any(f"checkpoint {path} is damaged")


def describe_megatron(path: Path | str) -> dict[str, Any]:
    """What `inspect` shows: position, layers, parameters, dtypes, optimizer, layout, lineage, size,
    completeness.

    Reads `run_state.json` and the checkpoint's tensor index; no weights, no process groups.
    Raises UserError when `path` is not a complete checkpoint of this project.
    """
    path = Path(path)
    content = _read(path)
    state = _state(content, path)
    problem = None
    try:
        check_files(path)
    except UserError as error:
        problem = str(error)
    summary: dict[str, Any] = {
        "kind": "megatron checkpoint",
        "complete": problem is None,
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "layers": state.hf_config.get("num_hidden_layers"),
        "parallel": state.parallel,
        "bytes": sum(content["files"].values()),
        "files": len(content["files"]),
        "source": state.source,
        "lineage": state.lineage,
        "versions": content.get("versions", {}),
    }
    return {**summary, "problem": problem} if problem else {**summary, **_tensors(path)}


def _tensors(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from solar_mega.checkpoint.index import read_index

    stored = read_index(path).state_dict_metadata
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    weights = {name: entry for name, entry in tensors.items() if not name.startswith("optimizer.")}
    dtypes = Counter()
    for entry in weights.values():
        dtypes[str(entry.properties.dtype).removeprefix("torch.")] += entry.size.numel()
    return {
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "optimizer": any(name.startswith("optimizer.") for name in tensors),
    }


def _read(path: Path) -> dict[str, Any]:
    file = path / RUN_STATE
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist or is not a directory")
    if not file.is_file():
        hint = (
            "it was not finished"
            if (path / "metadata.json").exists() or not any(path.iterdir())
            else "it is not one"
        )
        raise UserError(
            f"{path} has no {RUN_STATE}, which every complete checkpoint of solar_mega has; {hint}"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] != _FORMAT or not isinstance(content["files"], dict):
            raise ValueError(f'"format" is {content["format"]!r}')
        if content["version"] > _VERSION:
            raise ValueError(f"version {content['version']} is newer than this program's {_VERSION}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    return content


def _state(content: dict[str, Any], path: Path) -> RunState:
    names = {field.name for field in fields(RunState)}
    given = content.get("state")
    if not isinstance(given, dict) or not names - {"seed"} <= given.keys():
        raise UserError(f"{path / RUN_STATE} is damaged: its state lacks keys of {', '.join(sorted(names))}")
    return RunState(**{name: given[name] for name in names if name in given})


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "megatron-core")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
