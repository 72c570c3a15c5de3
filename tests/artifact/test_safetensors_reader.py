"""Safetensors read: slices of exactly the bytes asked for, lies of headers and indices found."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from solar_mega.artifact.safetensors_format import (
    DTYPES,
    INDEX,
    SINGLE,
    dtype_name,
    torch_dtype,
)
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.errors import UserError
from tests.artifact.tensors import random_tensor, same_bits, write_raw

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
