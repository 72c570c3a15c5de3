"""lineage.json and content hashes."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from solar_mega.artifact.lineage import (
    LINEAGE,
    Parent,
    directory_hash,
    package_versions,
    read_lineage,
    write_lineage,
)
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError


def test_hash_is_of_the_content(llama, tmp_path):
    before = directory_hash(llama)
    assert before.startswith("sha256:") and len(before) == 7 + 64
    assert directory_hash(shutil.copytree(llama, tmp_path / "copy")) == before, "not of places or times"
    (llama / "README.md").write_text("about it")
    (llama / LINEAGE).write_text("{}")
    (llama / ".cache").mkdir()
    (llama / ".cache" / "x").write_text("download state")
    assert directory_hash(llama) == before, "not of what is written about the model"


def test_hash_sees_every_change(llama):
    hashes = {directory_hash(llama)}
    shard = next(llama.glob("*.safetensors"))
    with open(shard, "r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    hashes.add(directory_hash(llama))
    shard.rename(llama / "other.safetensors")
    hashes.add(directory_hash(llama))
    (llama / "new").write_text("")
    hashes.add(directory_hash(llama))
    (llama / "sub").mkdir()
    (llama / "new").rename(llama / "sub" / "new")
    hashes.add(directory_hash(llama))
    (llama / ".metadata").write_text("part of a Megatron checkpoint")
    hashes.add(directory_hash(llama))
    assert len(hashes) == 6


def test_hashing_can_be_stopped(llama):
    with pytest.raises(InterruptedError):
        directory_hash(llama, lambda: True)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="shows what is open on Linux only")
def test_weights_are_hashed_first(llama):
    """So that they are read together with whoever works on them."""
    (llama / "consolidated.safetensors").write_bytes(bytes(100))
    opened = []

    def stopped() -> bool:
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(f"/proc/self/fd/{number}"))
                if path.parent == llama and path.name not in opened:
                    opened.append(path.name)
        return False

    directory_hash(llama, stopped)
    weights = [name for name in opened if name.startswith("model") and name.endswith(".safetensors")]
    assert weights and opened[: len(weights)] == weights and "consolidated.safetensors" in opened


def test_a_file_that_cannot_be_read_is_named(llama):
    (llama / "notes.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="notes.txt cannot be read: No such file"):
        directory_hash(llama)


def test_round_trip_with_ancestry(llama, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    grown = LayerMap.parse("dus:1", 6)
    write_lineage(first, "convert --layer-map dus:1", [Parent.of(llama)], grown)
    write_lineage(second, "pretrain", [Parent.of(first, "sha256:known")], config={"steps": 3})
    lineage = read_lineage(first)
    assert lineage.layer_map == grown and lineage.layer_map.spelling == "dus:1"
    assert lineage.parents == (Parent(str(llama), directory_hash(llama)),)
    assert (
        lineage.versions == package_versions()
        and {"solar_mega", "python", "torch"} <= lineage.versions.keys()
    )
    shutil.rmtree(first)
    trained = read_lineage(second)
    assert trained.config == {"steps": 3} and trained.layer_map is None
    assert trained.parents[0].hash == "sha256:known"
    assert trained.parents[0].lineage["parents"][0]["hash"] == directory_hash(llama), "ancestry survives"


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "cannot be read"),
        ("{}", "KeyError"),
        ('{"schema_version": 9}', "version 9.*reads 1"),
        ("[]", "TypeError"),
    ],
)
def test_unreadable(tmp_path, text, said):
    assert read_lineage(tmp_path) is None
    (tmp_path / LINEAGE).write_text(text)
    with pytest.raises(UserError, match=said):
        read_lineage(tmp_path)


def test_file_is_plain_json(tmp_path):
    write_lineage(tmp_path, "convert", [])
    content = json.loads((tmp_path / LINEAGE).read_text())
    assert content["schema_version"] == 1 and content["created"].endswith("+00:00")
