"""Safetensors written: streamed shards that the library itself reads back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from solar_mega.artifact.safetensors_format import (
    INDEX,
    SINGLE,
    dtype_name,
)
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.safetensors_writer import ShardedWriter, split_into_shards
from solar_mega.errors import UserError
from tests.artifact.tensors import random_tensor, same_bits


def mixed_tensors():
    return {
        "flag": torch.tensor([True, False, True]),
        "a": random_tensor((3, 5), torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "b": random_tensor((7,), torch.float64, 1),
        "empty": torch.zeros(0, 3),
        "c": random_tensor((4, 4), torch.float32, 2),
    }


def plan_of(tensors):
    return [(name, dtype_name(t.dtype), t.shape) for name, t in tensors.items()]


class TestWriting:
    @pytest.mark.parametrize("shard_bytes", [1, 40, 100, 10**9])
    def test_the_safetensors_library_reads_it_back(self, tmp_path, shard_bytes):
        tensors = mixed_tensors()
        with ShardedWriter(tmp_path, shard_bytes) as writer:
            writer.plan(plan_of(tensors))
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        found = {}
        for file in tmp_path.glob("*.safetensors"):
            found |= load_file(file)
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
        reader = SafetensorsReader(tmp_path)
        assert (tmp_path / SINGLE).exists() == (shard_bytes == 10**9) == (not (tmp_path / INDEX).exists())
        for info in reader.infos.values():
            width = tensors[info.name].element_size()
            assert info.offset % width == 0, f"{info.name} is not aligned"
        if (tmp_path / INDEX).exists():
            metadata = json.loads((tmp_path / INDEX).read_text())["metadata"]
            assert metadata["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
            assert metadata["total_parameters"] == sum(t.numel() for t in tensors.values())

    def test_any_order_and_strided_tensors(self, tmp_path):
        tensors = {"a": torch.randn(6, 4).t(), "b": torch.randn(8, 3)[::2, 1]}
        with ShardedWriter(tmp_path) as writer:
            writer.plan(plan_of(tensors))
            for name in reversed(tensors):
                writer.write(name, tensors[name])
        assert all(torch.equal(load_file(tmp_path / SINGLE)[name], t) for name, t in tensors.items())

    def test_unfinished_files_do_not_open(self, tmp_path):
        tensors = mixed_tensors()
        with (
            pytest.raises(ValueError, match="5 of 6 planned tensors were not written"),
            ShardedWriter(tmp_path) as writer,
        ):
            writer.plan(plan_of(tensors))
            writer.write("a", tensors["a"])
        with pytest.raises(UserError, match="not a finished safetensors file"):
            SafetensorsReader(tmp_path)
        with pytest.raises(Exception, match="[Hh]eader"):
            load_file(tmp_path / SINGLE)

    def test_an_unfinished_sharded_directory_does_not_open(self, tmp_path):
        tensors = mixed_tensors()
        with pytest.raises(KeyboardInterrupt), ShardedWriter(tmp_path, 1) as writer:
            writer.plan(plan_of(tensors))
            writer.write("a", tensors["a"])
            raise KeyboardInterrupt
        assert not (tmp_path / INDEX).exists()
        with pytest.raises(UserError):
            SafetensorsReader(tmp_path)

    def test_what_was_not_planned_is_refused(self, tmp_path):
        writer = ShardedWriter(tmp_path)
        writer.plan([("a", "F32", (2, 2))])
        for name, tensor in (
            ("b", torch.zeros(2, 2)),
            ("a", torch.zeros(4)),
            ("a", torch.zeros(2, 2).half()),
        ):
            with pytest.raises(ValueError, match="plan"):
                writer.write(name, tensor)
        writer.write("a", torch.zeros(2, 2))
        with pytest.raises(ValueError, match="written before"):
            writer.write("a", torch.zeros(2, 2))
        with pytest.raises(ValueError, match="no name twice"):
            ShardedWriter(tmp_path).plan([("a", "F32", (1,))] * 2)
        for chunks in ([b"1234"], [b"12345678", b"9"]):
            sink = tmp_path / str(len(chunks))
            sink.mkdir()
            other = ShardedWriter(sink)
            other.plan([("a", "F32", (2,))])
            with pytest.raises(ValueError, match="bytes"):
                other.write_chunks("a", chunks)

    def test_copying_moves_every_bit(self, llama, tmp_path):
        """NaN payloads and negative zeros survive: nothing is decoded."""
        odd = tmp_path / "odd"
        odd.mkdir()
        payload = random_tensor((1000,), torch.bfloat16, 3)
        assert payload.isnan().any()
        save_file({"x": payload}, odd / SINGLE)
        steps = []
        with SafetensorsReader(odd) as reader, ShardedWriter(tmp_path) as writer:
            writer.plan([("y", "BF16", (1000,))])
            writer.copy_from(reader, "x", "y", steps.append)
            assert sum(steps) == reader.bytes_read == 2000
        assert same_bits(SafetensorsReader(tmp_path).read("y"), payload)

    def test_existing_files_are_not_overwritten(self, tmp_path):
        (tmp_path / SINGLE).write_text("precious")
        with pytest.raises(FileExistsError), ShardedWriter(tmp_path) as writer:
            writer.plan([("a", "F32", (1,))])
            writer.write("a", torch.zeros(1))
        assert (tmp_path / SINGLE).read_text() == "precious"

    @given(st.lists(st.integers(0, 50)), st.integers(1, 60))
    def test_shards_are_greedy_and_in_order(self, sizes, limit):
        named = [(str(i), size) for i, size in enumerate(sizes)]
        shards = split_into_shards(named, limit)
        assert [name for shard in shards for name in shard] == [name for name, _ in named]
        filled = [sum(sizes[int(name)] for name in shard) for shard in shards]
        for shard, total, following in zip(shards, filled, [*shards[1:], None], strict=True):
            assert total <= limit or len([n for n in shard if sizes[int(n)]]) == 1
            if following:
                assert total + sizes[int(following[0])] > limit


def test_several_threads_write_one_file(tmp_path):
    """Opening a new file is a race that used to be lost with FileExistsError."""
    from concurrent.futures import ThreadPoolExecutor

    names = [f"t{i}" for i in range(64)]
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with ShardedWriter(folder) as writer, ThreadPoolExecutor(8) as pool:
            writer.plan([(name, "F32", (3,)) for name in names])
            list(pool.map(lambda name, out=writer: out.write(name, tensors[name]), names))
        reader = SafetensorsReader(folder)
        assert all(torch.equal(reader.read(name), tensors[name]) for name in names)
