"""Safetensors: slices of exactly the bytes asked for, lies of headers and indices found, streamed shards."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from solar_mega.artifact.safetensors_format import (
    DTYPES,
    INDEX,
    SINGLE,
    dtype_name,
    tensor_bytes,
    torch_dtype,
)
from solar_mega.artifact.safetensors_io import SafetensorsReader, ShardedWriter, split_into_shards
from solar_mega.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random_tensor(shape, dtype, seed=0):
    bits = torch.randint(
        0, 256, (tensor_bytes(dtype_name(dtype), shape),), generator=torch.Generator().manual_seed(seed)
    )
    if dtype == torch.bool:
        bits %= 2
    return bits.to(torch.uint8).view(dtype).view(shape)


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def write_raw(path, header, data=b""):
    """A file with exactly this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class TestReading:
    @pytest.mark.parametrize("dtype", [torch_dtype(name) for name, (_, known) in DTYPES.items() if known])
    def test_every_dtype_as_the_safetensors_library_wrote_it(self, tmp_path, dtype):
        tensor = random_tensor((5, 3), dtype)
        save_file({"x": tensor}, tmp_path / SINGLE)
        with SafetensorsReader(tmp_path) as reader:
            assert reader.infos["x"].dtype == dtype_name(dtype)
            assert same_bits(reader.read("x"), tensor)
            assert b"".join(reader.raw("x", 4)) == tensor.view(torch.uint8).numpy().tobytes()

    def test_scalars_and_empty_tensors(self, tmp_path):
        tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "none": torch.zeros(4, 0)}
        save_file(tensors, tmp_path / SINGLE)
        reader = SafetensorsReader(tmp_path)
        for name, tensor in tensors.items():
            assert same_bits(reader.read(name), tensor)
        assert reader.read_rows("none", 1, 3).shape == (2, 0)
        assert reader.read_rows("none", 0, 0, dim=1).shape == (4, 0)

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_slices_read_exactly_their_bytes(self, tmp_path_factory, data):
        shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, shape[dim]))
        stop = data.draw(st.integers(start, shape[dim]))
        tensor = random_tensor(shape, data.draw(st.sampled_from(FLOATS)))
        directory = tmp_path_factory.mktemp("slices")
        save_file({"before": torch.ones(3), "x": tensor, "z": torch.ones(3)}, directory / SINGLE)
        with SafetensorsReader(directory) as reader:
            found = reader.read_rows("x", start, stop, dim)
            expected = tensor.narrow(dim, start, stop - start)
            assert same_bits(found, expected.contiguous())
            assert reader.bytes_read == expected.numel() * tensor.element_size()

    def test_the_kernel_is_asked_for_those_bytes_and_no_others(self, tmp_path, monkeypatch):
        """The counter is checked against the system calls themselves."""
        tensor = random_tensor((64, 32), torch.bfloat16)
        save_file({"x": tensor}, tmp_path / SINGLE)
        reader = SafetensorsReader(tmp_path)
        asked = []
        preadv = os.preadv

        def spy(descriptor, buffers, offset):
            asked.extend(range(offset, offset + sum(len(b) for b in buffers)))
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", spy)
        reader.read_rows("x", 8, 16, dim=1)
        base = reader.infos["x"].offset
        wanted = {
            base + 2 * (32 * row + column) + byte
            for row in range(64)
            for column in range(8, 16)
            for byte in (0, 1)
        }
        assert sorted(asked) == sorted(wanted) and reader.bytes_read == len(wanted)

    def test_two_halves_are_the_whole(self, tmp_path):
        tensor = random_tensor((6, 10), torch.bfloat16)
        save_file({"x": tensor}, tmp_path / SINGLE)
        reader = SafetensorsReader(tmp_path)
        for dim in (0, 1):
            half = tensor.shape[dim] // 2
            parts = [reader.read_rows("x", a, a + half, dim) for a in (0, half)]
            assert same_bits(torch.cat(parts, dim), tensor)
        assert reader.bytes_read == 2 * tensor.numel() * 2

    def test_out_of_range_and_unknown(self, tmp_path):
        save_file({"x": torch.zeros(4, 4)}, tmp_path / SINGLE)
        reader = SafetensorsReader(tmp_path)
        for arguments in ((0, 5), (-1, 2), (3, 2), (0, 1, 2)):
            with pytest.raises(ValueError, match="outside x"):
                reader.read_rows("x", *arguments)
        with pytest.raises(UserError, match="no tensor y"):
            reader.read("y")

    def test_a_file_cut_after_opening(self, tmp_path):
        save_file({"x": torch.zeros(4, 4)}, tmp_path / SINGLE)
        reader = SafetensorsReader(tmp_path)
        os.truncate(tmp_path / SINGLE, 100)
        for action in (lambda: reader.read("x"), lambda: list(reader.raw("x"))):
            with pytest.raises(UserError, match="was cut"):
                action()

    def test_shards_made_by_transformers(self, llama):
        reader = SafetensorsReader(llama)
        assert len(reader.files) > 3
        expected = {}
        for file in reader.files:
            expected |= load_file(llama / file)
        assert reader.infos.keys() == expected.keys()
        assert all(same_bits(reader.read(name), tensor) for name, tensor in expected.items())
        assert reader.bytes_read == reader.total_bytes


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class TestHeadersThatLie:
    @pytest.mark.parametrize(
        "header, data, said",
        [
            ({"a": entry()}, bytes(7), "truncated.*a"),
            ({"a": entry()}, bytes(9), "1 bytes after the last tensor"),
            ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "b overlaps"),
            ({"a": entry(), "b": entry(offsets=(0, 8))}, bytes(8), "overlaps"),
            ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "b leaves a gap"),
            ({"a": entry(offsets=(4, 12))}, bytes(12), "a leaves a gap"),
            ({"a": entry(shape=(3,))}, bytes(8), "takes 12 bytes, its offsets span 8"),
            ({"a": entry(dtype="F99")}, bytes(8), "F99 is unknown.*BF16"),
            ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 2))}, bytes(2), "whole bytes"),
            ({"a": entry(shape=(-2,))}, bytes(8), "not lists of sizes"),
            ({"a": entry(shape=("2",))}, bytes(8), "not lists of sizes"),
            ({"a": entry(offsets=(8, 0))}, bytes(8), "not lists of sizes"),
            ({"a": {"dtype": "F32"}}, bytes(8), "lacks dtype, shape or data_offsets"),
            ({"a": 1}, b"", "lacks"),
            (["a"], b"", "not a JSON object"),
            (b"{not json", b"", "header is not valid"),
            (b"\xff\xfe", b"", "header is not valid"),
            (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), '"a" appears twice'),
            (b"", b"", "not a finished safetensors file"),
        ],
    )
    def test_is_found_before_anything_is_read(self, tmp_path, header, data, said):
        write_raw(tmp_path / SINGLE, header, data)
        with pytest.raises(UserError, match=said):
            SafetensorsReader(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"", b"abc", struct.pack("<Q", 1 << 60), struct.pack("<Q", 50) + b"{}"]
    )
    def test_not_a_safetensors_file(self, tmp_path, content):
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(UserError, match="not a finished|truncated or not safetensors"):
            SafetensorsReader(tmp_path)

    @settings(deadline=None, max_examples=60)
    @given(data=st.binary(max_size=200))
    def test_any_bytes_are_refused_or_consistent(self, tmp_path_factory, data):
        directory = tmp_path_factory.mktemp("fuzz")
        (directory / SINGLE).write_bytes(data)
        with pytest.raises(UserError):
            SafetensorsReader(directory)


class TestIndexThatLies:
    def edit(self, llama, change):
        content = json.loads((llama / INDEX).read_text())
        change(content["weight_map"])
        (llama / INDEX).write_text(json.dumps(content))

    def test_missing_and_truncated_shards_are_named_together(self, llama):
        first, second = sorted(set(json.loads((llama / INDEX).read_text())["weight_map"].values()))[:2]
        os.remove(llama / first)
        os.truncate(llama / second, os.path.getsize(llama / second) - 1)
        with pytest.raises(UserError) as caught:
            SafetensorsReader(llama)
        message = str(caught.value)
        assert f"{first}: missing" in message and f"{second}: truncated" in message
        assert len(message.splitlines()) == 3, "one line per damaged shard, not per tensor in it"

    def test_names_that_no_shard_has(self, llama):
        file = SafetensorsReader(llama).files[0]
        self.edit(llama, lambda weights: weights.update({"model.layers.9.ghost": file}))
        with pytest.raises(UserError, match="places model.layers.9.ghost in .*does not have it"):
            SafetensorsReader(llama)

    def test_names_in_another_shard_or_unlisted(self, llama):
        files = SafetensorsReader(llama).files
        self.edit(llama, lambda weights: weights.update({"model.norm.weight": files[0]}))
        with pytest.raises(UserError, match="places model.norm.weight in .*but it is in"):
            SafetensorsReader(llama)
        self.edit(llama, lambda weights: weights.pop("model.norm.weight"))
        with pytest.raises(UserError, match="holds model.norm.weight, which .*does not list"):
            SafetensorsReader(llama)

    def test_the_same_tensor_twice(self, tmp_path):
        for file in ("a.safetensors", "b.safetensors"):
            save_file({"x": torch.zeros(2), file: torch.zeros(2)}, tmp_path / file)
        weights = {"x": "a.safetensors", "a.safetensors": "a.safetensors", "b.safetensors": "b.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(UserError, match="x is in both a.safetensors and b.safetensors"):
            SafetensorsReader(tmp_path)

    @pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "", ".."])
    def test_files_elsewhere_are_refused(self, tmp_path, file):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(UserError, match="beside the index"):
            SafetensorsReader(tmp_path)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
    )
    def test_not_an_index(self, tmp_path, text):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UserError, match="not a valid index|lists no tensors"):
            SafetensorsReader(tmp_path)

    def test_both_kinds_at_once(self, llama):
        save_file({"x": torch.zeros(1)}, llama / SINGLE)
        with pytest.raises(UserError, match="both"):
            SafetensorsReader(llama)

    @pytest.mark.parametrize(
        "name, said",
        [
            ("consolidated.00.pth", "pickles of unknown names.*pytorch_model.bin"),
            ("x.safetensors", "no model"),
            ("a", "no weights"),
        ],
    )
    def test_what_is_supported_is_said(self, tmp_path, name, said):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=said) as caught:
            SafetensorsReader(tmp_path)
        assert SINGLE in str(caught.value)

    def test_many_problems_fit_on_a_screen(self, llama):
        file = SafetensorsReader(llama).files[0]
        self.edit(llama, lambda weights: weights.update({f"ghost.{i}": file for i in range(500)}))
        with pytest.raises(UserError, match="and 480 more") as caught:
            SafetensorsReader(llama)
        assert len(str(caught.value).splitlines()) < 25


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
