"""PyTorch's .bin checkpoints as sources: the same tensors as safetensors, refusals of what is not tensors."""

import json
import os
import shutil

import pytest
import torch

from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.verify import verify
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError


def pickled(directory, shards=True):
    """The directory's safetensors as .bin files of the same names."""
    reader = SafetensorsReader(directory)
    files = {}
    for name, info in reader.infos.items():
        number = reader.files.index(info.file) + 1 if shards else 1
        files.setdefault(number, {})[name] = reader.read(name)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    if not shards:
        torch.save(files[1], directory / "pytorch_model.bin")
        return directory
    weight_map = {}
    for number, tensors in files.items():
        file = f"pytorch_model-{number:05d}-of-{len(files):05d}.bin"
        torch.save(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("shards", [True, False])
def test_the_same_tensors_as_safetensors(llama, tmp_path, shards):
    expected = SafetensorsReader(llama)
    whole = {name: expected.read(name) for name in expected.infos}
    directory = pickled(llama, shards)
    reader = SafetensorsReader(directory)
    assert len(reader.files) == (len(expected.files) if shards else 1)
    assert reader.infos.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read_rows(name, 1, 3), tensor[1:3])
        assert reader.infos[name].shape == tuple(tensor.shape)


def test_it_grows_to_the_same_model_bit_for_bit(pristine_llama, llama, tmp_path):
    source, layer_map = HFDirectory(pickled(llama)), LayerMap.parse("dus:2+scale:0.5@copies", 6)
    grow(source, tmp_path / "from-bin", layer_map)
    grown = HFDirectory(tmp_path / "from-bin")
    assert verify(source, grown, layer_map).ok
    report = verify(HFDirectory(pristine_llama), grown, layer_map)
    assert report.ok, report.describe()


def test_bf16_and_shared_storages(tmp_path):
    base = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    torch.save({"a": base, "rows": base[1:3], "scalar": torch.tensor(7)}, tmp_path / "pytorch_model.bin")
    reader = SafetensorsReader(tmp_path)
    assert torch.equal(reader.read("rows"), base[1:3]) and reader.read("scalar").item() == 7


def test_safetensors_win_where_both_are(llama):
    torch.save({"other": torch.zeros(1)}, llama / "pytorch_model.bin")
    assert "other" not in SafetensorsReader(llama).infos


class _Hostile:
    def __reduce__(self):
        return (os.mkdir, ("opened",))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: torch.save({"a": _Hostile()}, path), "not opened.*mkdir"),
        (lambda path: torch.save([torch.zeros(1)], path), "list, not names and tensors"),
        (lambda path: torch.save({"model": {"a": torch.zeros(1)}}, path), "model: a dict, not a tensor"),
        (lambda path: torch.save({"a": torch.zeros(2, 3).t()}, path), "a: not stored row by row"),
        (
            lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
            "before 1.6",
        ),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"PK\x03\x04 nothing"), "truncated"),
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, make, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        SafetensorsReader(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_a_cut_shard_and_a_wrong_index_are_told_together(llama):
    directory = pickled(llama)
    first, second, *_ = sorted(directory.glob("*.bin"))
    first.write_bytes(first.read_bytes()[:-400])
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == second.name)
    del index["weight_map"][name]
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="2 problems") as caught:
        SafetensorsReader(directory)
    assert first.name in str(caught.value) and f"{second.name} holds {name}" in str(caught.value)


def test_a_missing_shard(llama, tmp_path):
    directory = shutil.copytree(pickled(llama), tmp_path / "copy")
    next(iter(sorted(directory.glob("*.bin")))).unlink()
    with pytest.raises(UserError, match="missing or unreadable"):
        SafetensorsReader(directory)
