"""Where a model directory comes from: `lineage.json` beside the weights, and content hashes that prove it."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solar_mega import __version__
from solar_mega.artifact.safetensors_format import read_index
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import Problems, UserError
from solar_mega.runtime.files import ReadAhead

LINEAGE = "lineage.json"
SCHEMA_VERSION = 1
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy")
# Written about the model, not part of it: two runs that make the same model must have the same hash.
_ABOUT = (LINEAGE, "README.md")
HASH_CHUNK = 2 << 20
"""Bytes that `directory_hash` reads at a time."""


@dataclass(frozen=True)
class Parent:
    """A directory that a model was made from."""

    path: str
    """Absolute path at the time."""

    hash: str
    """`directory_hash` of its content."""

    lineage: dict[str, Any] | None = None
    """Its own lineage.json, so that the whole ancestry survives when the parent is deleted."""

    @classmethod
    def of(cls, path: Path, content_hash: str | None = None) -> "Parent":
        """Describes `path` as it is now; hashes it unless its hash is known."""
        own = Path(path) / LINEAGE
        content = json.loads(own.read_text("utf-8")) if own.exists() else None
        return cls(str(Path(path).absolute()), content_hash or directory_hash(path), content)


@dataclass(frozen=True)
class Lineage:
    """What lineage.json says."""

    made_by: str
    """The verb and what it did, such as `convert --layer-map dus:8`."""

    parents: tuple[Parent, ...]
    layer_map: LayerMap | None
    """From the first parent's layers to this model's; None where depth did not change hands."""

    config: dict[str, Any] | None
    """The resolved configuration of the run, where there was one."""

    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""

    schema_version: int = SCHEMA_VERSION


def write_lineage(
    directory: Path,
    made_by: str,
    parents: Sequence[Parent],
    layer_map: LayerMap | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes lineage.json into `directory`. `config` must be JSON-able (paths as text)."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "made_by": made_by,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "parents": [asdict(parent) for parent in parents],
        "layer_map": None if layer_map is None else layer_map.to_json(),
        "config": None if config is None else dict(config),
        "versions": package_versions(),
    }
    (Path(directory) / LINEAGE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read_lineage(directory: Path) -> Lineage | None:
    """The lineage of a model directory; None where it has none. Raises UserError when it is unreadable."""
    path = Path(directory) / LINEAGE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {version}; this program reads {SCHEMA_VERSION}")
        layer_map = content["layer_map"]
        return Lineage(
            made_by=content["made_by"],
            parents=tuple(Parent(**parent) for parent in content["parents"]),
            layer_map=None if layer_map is None else LayerMap.from_json(layer_map),
            config=content["config"],
            versions=content["versions"],
            created=content["created"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def package_versions() -> dict[str, str]:
    """Versions of what computes the weights; packages that are not installed are left out."""
    versions = {"solar_mega": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def directory_hash(directory: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """`sha256:` of all files' names, sizes and contents, streamed.

    Covers every file (links followed) except those in hidden directories, and except lineage.json and
    README.md, which tell about the model and carry dates. Files are hashed one by one and the list of hashes
    once more, so the result depends neither on their order on disk nor on their times. `stopped` is asked
    between chunks and ends the work with InterruptedError. Raises UserError naming a file that cannot be
    read.
    """
    directory = Path(directory)
    with ReadAhead(HASH_CHUNK) as ahead:
        lines = {
            path: f"{path}\0{_content(ahead, directory / path, stopped)}\n"
            for path in _weights_first(directory)
        }
    total = hashlib.sha256("".join(lines[path] for path in sorted(lines)).encode())
    return f"sha256:{total.hexdigest()}"


def _content(ahead: ReadAhead, file: Path, stopped: Callable[[], bool]) -> str:
    """Size and hash."""
    digest, size = hashlib.sha256(), 0
    try:
        for piece in ahead.read(file):
            if stopped():
                raise InterruptedError("hashing was stopped")
            digest.update(piece)
            size += len(piece)
    except InterruptedError:  # one of the OSErrors
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return f"{size}\0{digest.hexdigest()}"


def _weights_first(directory: Path) -> list[str]:
    """All files, those that a conversion or merge reads at the same time in front: the disk then delivers
    them once. Other weights may lie beside them, in another format."""
    weights, _ = read_index(directory, Problems())
    return sorted(_files(directory), key=lambda path: (path not in weights, path))


def _files(directory: Path) -> list[str]:
    found = []
    for place, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, directory)
        for name in names:
            path = os.path.normpath(os.path.join(inside, name))
            if path not in _ABOUT:
                found.append(path)
    return found
