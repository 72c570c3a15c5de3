"""How the inputs of a merge are read: in windows, wherever their bytes begin, not beyond a file's end."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from solar_mega.artifact.lineage import directory_hash
from solar_mega.errors import UserError
from solar_mega.merge import chunks
from solar_mega.merge.chunks import Stream
from solar_mega.merge.models import FileTensors
from solar_mega.merge.parents import Parents
from solar_mega.merge.plan import Job, Origin


@pytest.fixture
def full_size_chunks(small_chunks, monkeypatch):
    """As users have them."""
    monkeypatch.undo()


def job_of(*directories: Path) -> Job:
    readers = [FileTensors(directory) for directory in directories]
    origins = tuple(Origin(reader, reader.info("w")) for reader in readers)
    info = origins[0].info
    return Job("w", info.dtype, info.shape, origins, None, {}, (1.0,) * len(origins), ())


def stored(directory: Path, tensor: torch.Tensor) -> Path:
    directory.mkdir()
    save_file({"w": tensor}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_chunks_of_several_windows(full_size_chunks, tmp_path):
    elements = 2 * chunks._WINDOW + chunks.CHUNK + 17
    whole = torch.arange(elements, dtype=torch.int32).view(torch.float32)
    stream = Stream(job_of(stored(tmp_path / "a", whole)))
    for _ in range(2):
        pieces = [inputs[0].clone() for inputs, _ in stream.stored()]
        assert [len(piece) for piece in pieces[:-1]] == [chunks.CHUNK] * (len(pieces) - 1)
        assert torch.equal(torch.cat(pieces).view(torch.int32), whole.view(torch.int32))


def test_chunks_that_are_written_to_leave_the_file_alone(tmp_path):
    a = stored(tmp_path / "a", torch.ones(100_000))
    before = directory_hash(a)
    for inputs, _ in Stream(job_of(a)).stored():
        inputs[0].zero_()
    for (x,) in Stream(job_of(a)):
        x.zero_()
    assert directory_hash(a) == before


def test_weights_at_odd_addresses(tmp_path):
    """Old files were not padded: their tensors begin wherever the header ends."""
    values = torch.randn(100_003).bfloat16()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [100_003], "data_offsets": [0, 200_006]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd number of bytes
    (tmp_path / "odd").mkdir()
    data = struct.pack("<Q", len(header)) + header + bytes(values.view(torch.uint8).numpy())
    (tmp_path / "odd" / "model.safetensors").write_bytes(data)
    job = job_of(tmp_path / "odd", stored(tmp_path / "even", values))
    assert job.inputs[0].info.offset % 2 == 1
    for inputs, _ in Stream(job).stored():
        assert torch.equal(*inputs) and inputs[0].data_ptr() % 2 == 0


def test_a_file_cut_after_it_was_opened(tmp_path):
    a = stored(tmp_path / "a", torch.ones(1_000_000))
    job = job_of(a)
    os.truncate(a / "model.safetensors", 3_000_000)
    with pytest.raises(UserError, match="model.safetensors was cut while it was read"):
        for _ in Stream(job).stored():
            pass


def test_hashing_goes_ahead_of_merging_but_not_far(tmp_path, monkeypatch):
    from solar_mega.artifact import lineage
    from solar_mega.merge import parents

    monkeypatch.setattr(parents, "_APART", 3_000_000)
    for module in (parents, lineage):
        monkeypatch.setattr(module, "HASH_CHUNK", 1_000_000)
    a = stored(tmp_path / "a", torch.zeros(5_000_000))  # 20 MB
    (a / "config.json").write_text("{}")
    expected = directory_hash(a)

    class Plan:
        jobs = (job_of(a),)
        models = {a: FileTensorsOf(a)}

    with Parents([a, a, tmp_path / "absent"]) as known:
        known.follow(Plan)
        for _ in range(10):
            with known.merging(2_000_000):
                ahead = known._hashed[a] - known._merged
                assert 2_000_000 <= ahead <= 5_000_000 or known._hashed[a] == float("inf")
        (found,) = known.done(Plan)
    assert found == expected


class FileTensorsOf:
    """What Parents asks of a model."""

    def __init__(self, path: Path) -> None:
        self.tensors = FileTensors(path)

    def parent(self, content_hash):
        return content_hash


def test_hashing_begins_without_torch():
    code = "import sys, solar_mega.merge.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
