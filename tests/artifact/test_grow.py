"""HF -> HF: what is written equals a hand-built model; a crash never leaves anything that looks like one."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from solar_mega.artifact.cast import weight_dtype
from solar_mega.artifact.grow import grow, plan_growth
from solar_mega.artifact.hf import HFDirectory, split_layer
from solar_mega.artifact.inspect import inspect_hf
from solar_mega.artifact.lineage import directory_hash, read_lineage
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.verify import verify
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError

from .conftest import make_llama

TOKENS = torch.arange(24).reshape(2, 12) * 3 % 96


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def oracle_logits(path, targets):
    """The source model with its list of layers replaced by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[source] for source in targets])
    model.config.num_hidden_layers = len(targets)
    return logits(model)


def run_grow(src, dst, extra="", **kwargs):
    """grow in a process of its own. `extra` may define a progress factory named `progress`."""
    code = textwrap.dedent(extra) + textwrap.dedent(f"""
        import sys
        from solar_mega.artifact.grow import grow
        from solar_mega.artifact.hf import HFDirectory
        from solar_mega.depth.layer_map import LayerMap
        from solar_mega.errors import UserError
        options = dict(progress=progress) if "progress" in globals() else {{}}
        try:
            source, dus = HFDirectory({str(src)!r}), LayerMap.parse("dus:2", 6)
            grow(source, {str(dst)!r}, dus, shard_bytes=60_000, **options)
        except UserError as error:
            sys.exit(f"UserError: {{error}}")
    """)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def assert_absent(dst):
    """Nothing at `dst`; what a killed run left beside it is hidden and does not open as a checkpoint."""
    assert not dst.exists()
    for left in dst.parent.glob(".*partial*"):
        with pytest.raises(UserError):
            SafetensorsReader(left)


class TestGrown:
    @pytest.mark.parametrize("spelling", ["dus:2", "stack:2", "identity", "5,0,0,3", "slices:0-4,1-6"])
    def test_equals_a_hand_built_model(self, llama, tmp_path, spelling):
        from transformers import AutoModelForCausalLM

        layer_map = LayerMap.parse(spelling, 6)
        report = grow(HFDirectory(llama), tmp_path / "grown", layer_map, shard_bytes=50_000)
        grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
        assert grown.config.num_hidden_layers == len(layer_map) == report.layers
        assert grown.num_parameters() == report.parameters
        assert torch.equal(logits(grown), oracle_logits(llama, layer_map))
        assert verify(HFDirectory(llama), HFDirectory(tmp_path / "grown"), layer_map).ok

    def test_families_with_other_configs(self, tmp_path):
        from transformers import AutoModelForCausalLM

        tied = make_llama(tmp_path / "tied", layers=3, tie_word_embeddings=True, dtype=torch.bfloat16)
        layer_map = LayerMap.parse("dus:1", 3)
        grow(HFDirectory(tied), tmp_path / "grown", layer_map)
        grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
        assert grown.dtype == torch.bfloat16 and grown.config.tie_word_embeddings
        assert torch.equal(logits(grown), oracle_logits(tied, layer_map))

    def test_what_lies_beside_the_weights(self, llama, tmp_path):
        layer_map = LayerMap.parse("dus:2", 6)
        report = grow(HFDirectory(llama), tmp_path / "grown", layer_map, shard_bytes=50_000)
        source, grown = HFDirectory(llama), HFDirectory(tmp_path / "grown")
        assert grown.side_files == source.side_files
        for name in grown.side_files:
            assert (grown.path / name).read_bytes() == (llama / name).read_bytes()
        lineage = read_lineage(grown.path)
        assert lineage.layer_map == layer_map
        assert lineage.parents[0].hash == directory_hash(llama) and lineage.parents[0].path == str(llama)
        card = (grown.path / "README.md").read_text()
        assert "seam after layer 3: source 3 -> 2, layer distance 1" in card and "depth-up-scaling" in card
        assert "continues pretraining" in card
        assert (report.tensors, report.nbytes) == (len(grown.tensors.infos), grown.tensors.total_bytes)
        assert report.shards == len(grown.tensors.files) > 1
        assert os.listdir(tmp_path).count("grown") == 1 and not list(tmp_path.glob(".*"))

    def test_growing_twice_is_growing_by_the_composed_map(self, llama, tmp_path):
        first, second = LayerMap.parse("dus:1", 6), LayerMap.parse("dus:3", 10)
        grow(HFDirectory(llama), tmp_path / "a", first)
        grow(HFDirectory(tmp_path / "a"), tmp_path / "b", second)
        grow(HFDirectory(llama), tmp_path / "c", first.compose(second))
        assert directory_hash(tmp_path / "b") == directory_hash(tmp_path / "c")
        assert read_lineage(tmp_path / "b").parents[0].lineage["layer_map"]["spelling"] == "dus:1"

    def test_per_layer_settings_follow(self, llama, tmp_path):
        config = json.loads((llama / "config.json").read_text()) | {"layer_types": list("abcdef")}
        (llama / "config.json").write_text(json.dumps(config))
        grow(HFDirectory(llama), tmp_path / "grown", LayerMap.parse("dus:2", 6))
        assert "".join(HFDirectory(tmp_path / "grown").config["layer_types"]) == "abcdcdef"

    def test_progress_counts_every_byte(self, llama, tmp_path):
        from contextlib import nullcontext

        seen = []

        class Line:
            advance = staticmethod(seen.append)

        def progress(total, unit, label, initial=0):
            seen.append(-total)
            return nullcontext(Line)

        report = grow(HFDirectory(llama), tmp_path / "grown", LayerMap.parse("dus:2", 6), progress=progress)
        assert sum(seen) == 0 and -seen[0] == report.nbytes
        verify(
            HFDirectory(llama), HFDirectory(tmp_path / "grown"), LayerMap.parse("dus:2", 6), progress=progress
        )
        assert sum(seen) == 0


class TestDtype:
    @pytest.mark.parametrize("name", ["bf16", "fp16"])
    def test_values_are_cast_once_as_torch_does(self, llama, tmp_path, name):
        layer_map, dtype = LayerMap.parse("dus:2", 6), weight_dtype(name)
        grow(HFDirectory(llama), tmp_path / "grown", layer_map, dtype=dtype)
        source, grown = SafetensorsReader(llama), SafetensorsReader(tmp_path / "grown")
        for move in plan_growth(HFDirectory(llama), layer_map).moves:
            found = grown.read(move.name)
            assert torch.equal(found, source.read(move.source).to(found.dtype))
        assert {info.dtype for info in grown.infos.values()} == {dtype}
        config = HFDirectory(tmp_path / "grown").config
        assert config.get("dtype", config.get("torch_dtype")) == {"bf16": "bfloat16", "fp16": "float16"}[name]
        assert verify(HFDirectory(llama), HFDirectory(tmp_path / "grown"), layer_map, dtype).ok
        assert "F32" in verify(HFDirectory(llama), HFDirectory(tmp_path / "grown"), layer_map).describe()

    def test_overflow_is_refused(self, tmp_path):
        big = make_llama(tmp_path / "big", layers=2)
        reader = SafetensorsReader(big)
        info = reader.infos["model.norm.weight"]
        with open(big / info.file, "r+b") as stream:
            stream.seek(info.offset)
            stream.write(torch.tensor([1e6]).numpy().tobytes())
        with pytest.raises(
            UserError, match="model.norm.weight has values up to 1e.06, which F16 cannot hold"
        ):
            grow(HFDirectory(big), tmp_path / "half", LayerMap.parse("dus:0", 2), dtype="F16")
        assert_absent(tmp_path / "half")

    def test_unknown_names(self):
        with pytest.raises(UserError, match='--dtype = "int8".*fp32, bf16, fp16'):
            weight_dtype("int8")


class TestRefusals:
    """All before anything is written."""

    def test_full_output_directory(self, llama, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("")
        with pytest.raises(UserError, match="not empty"):
            grow(HFDirectory(llama), tmp_path / "out", LayerMap.parse("dus:2", 6))
        with pytest.raises(UserError, match="not empty"):
            grow(HFDirectory(llama), llama, LayerMap.parse("dus:2", 6))
        assert os.listdir(tmp_path / "out") == ["precious"]

    def test_output_inside_the_source(self, llama):
        before = directory_hash(llama)
        with pytest.raises(UserError, match="inside the source"):
            grow(HFDirectory(llama), llama / "grown", LayerMap.parse("dus:2", 6))
        assert directory_hash(llama) == before

    @pytest.mark.parametrize(
        "layer_map, said",
        [
            (LayerMap.parse("dus:2", 8), "for 8 layers, num_hidden_layers is 6"),
            (LayerMap(6, (0, None, 1)), r"target layers \[1\] are fresh"),
        ],
    )
    def test_maps_that_cannot_be_grown(self, llama, tmp_path, layer_map, said):
        with pytest.raises(UserError, match=said):
            grow(HFDirectory(llama), tmp_path / "out", layer_map)
        assert_absent(tmp_path / "out")

    def test_damaged_sources(self, llama, tmp_path):
        shard = max(llama.glob("*.safetensors"))
        os.truncate(shard, shard.stat().st_size - 4)
        with pytest.raises(UserError, match=f"{shard.name}: truncated"):
            grow(HFDirectory(llama), tmp_path / "out", LayerMap.parse("dus:2", 6))
        shard.unlink()
        with pytest.raises(UserError, match=f"{shard.name}: missing"):
            grow(HFDirectory(llama), tmp_path / "out", LayerMap.parse("dus:2", 6))
        assert_absent(tmp_path / "out")

    def test_too_little_space(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr("solar_mega.runtime.files.free_bytes", lambda path: 1000)
        with pytest.raises(UserError, match="not enough disk space"):
            grow(HFDirectory(llama), tmp_path / "out", LayerMap.parse("dus:2", 6))
        assert_absent(tmp_path / "out")


KILL = """
    import contextlib, os, signal

    class Line:
        def __init__(self, after):
            self.left = after

        def advance(self, n):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.{name})

    def progress(total, unit, label, initial=0):
        return contextlib.nullcontext(Line({after}))
"""

FILL = """
    import contextlib, os

    class Line:
        def advance(self, n):
            with contextlib.suppress(OSError), open({ballast!r}, "ab") as stream:
                while True:
                    stream.write(bytes(1 << 16))
                    stream.flush()

    def progress(total, unit, label, initial=0):
        return contextlib.nullcontext(Line())
"""


class TestFaults:
    @pytest.mark.parametrize(
        "name, after", [("SIGKILL", 1), ("SIGKILL", 20), ("SIGKILL", 50), ("SIGTERM", 30)]
    )
    def test_killed_in_the_middle(self, llama, tmp_path, name, after):
        before, dst = directory_hash(llama), tmp_path / "out" / "grown"
        result = run_grow(llama, dst, KILL.format(name=name, after=after))
        assert result.returncode == -getattr(signal, name), result.stderr
        assert_absent(dst)
        assert directory_hash(llama) == before, "the source is only read"
        again = run_grow(llama, dst)
        assert again.returncode == 0, "a rerun finishes"
        assert "continuing what a killed run left" in again.stdout
        assert os.listdir(dst.parent) == ["grown"], "and clears what the killed run left"
        assert verify(HFDirectory(llama), HFDirectory(dst), LayerMap.parse("dus:2", 6)).ok

    def test_interrupted_from_the_keyboard(self, llama, tmp_path):
        dst = tmp_path / "out" / "grown"
        result = run_grow(llama, dst, KILL.format(name="SIGINT", after=5))
        assert "KeyboardInterrupt" in result.stderr and "the same command continues" in result.stdout
        assert_absent(dst)
        assert run_grow(llama, dst).returncode == 0
        assert os.listdir(dst.parent) == ["grown"]

    def test_a_limit_on_file_size(self, llama, tmp_path):
        """The kernel refuses to write beyond RLIMIT_FSIZE."""
        before, dst = directory_hash(llama), tmp_path / "out" / "grown"
        limit = 20_000
        result = run_grow(
            llama, dst, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        assert result.returncode == 1 and result.stderr.startswith("UserError: writing"), result.stderr
        assert "nothing unfinished was left behind" in result.stderr
        assert os.listdir(dst.parent) == [] and directory_hash(llama) == before

    def test_a_disk_that_fills_up(self, llama, tmp_path):
        """A real small file system (its own mount namespace), filled by somebody else after the check."""
        disk = tmp_path / "disk"
        disk.mkdir()
        script = tmp_path / "run.py"
        fill = textwrap.dedent(FILL.format(ballast=str(disk / "ballast")))
        script.write_text(
            fill
            + textwrap.dedent(f"""
            import os, sys
            from solar_mega.artifact.grow import grow
            from solar_mega.artifact.hf import HFDirectory
            from solar_mega.depth.layer_map import LayerMap
            from solar_mega.errors import UserError
            try:
                source, dus = HFDirectory({str(llama)!r}), LayerMap.parse("dus:2", 6)
                grow(source, {str(disk / "grown")!r}, dus, progress=progress)
            except UserError as error:
                print(error)
            print("left:", os.listdir({str(disk)!r}))
        """)
        )
        mount = f"mount -t tmpfs -o size=18M tmpfs {disk}"
        probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if not shutil.which("unshare") or subprocess.run([*probe, mount], capture_output=True).returncode:
            probe = ["unshare", "--mount", "sh", "-c"]
            if not shutil.which("unshare") or subprocess.run([*probe, mount], capture_output=True).returncode:
                pytest.skip("no mount namespaces here")
        result = subprocess.run(
            [*probe, f"{mount} && exec {sys.executable} {script}"],
            capture_output=True,
            text=True,
            env={**os.environ},
        )
        assert "the disk is full" in result.stdout, result.stdout + result.stderr
        assert "left: ['ballast']" in result.stdout


class TestInspect:
    def test_a_whole_model(self, llama, tmp_path):
        grow(HFDirectory(llama), tmp_path / "grown", LayerMap.parse("dus:2", 6), shard_bytes=50_000)
        found = inspect_hf(tmp_path / "grown")
        assert json.loads(json.dumps(found)) == found
        assert found["complete"] and found["problems"] == []
        assert (found["kind"], found["layers"], found["architecture"]) == (
            "huggingface",
            8,
            "LlamaForCausalLM",
        )
        assert found["dtypes"] == {"F32": found["parameters"]} and found["bytes"] == 4 * found["parameters"]
        assert found["lineage"]["layer_map"]["spelling"] == "dus:2"
        assert inspect_hf(llama)["lineage"] is None

    def test_a_damaged_one_is_described(self, llama):
        shard = min(llama.glob("*.safetensors"))
        shard.unlink()
        found = inspect_hf(llama)
        assert not found["complete"] and shard.name in found["problems"][0] and found["parameters"] is None
        assert found["layers"] == 6

    def test_not_a_model(self, tmp_path):
        with pytest.raises(UserError, match="config.json"):
            inspect_hf(tmp_path)


def test_plan_writes_nothing_and_knows_everything(llama, tmp_path):
    plan = plan_growth(HFDirectory(llama), LayerMap.parse("dus:2", 6), shard_bytes=50_000)
    assert sorted(os.listdir(tmp_path)) == ["llama"]
    report = grow(HFDirectory(llama), tmp_path / "grown", LayerMap.parse("dus:2", 6), shard_bytes=50_000)
    assert (plan.nbytes, plan.parameters, plan.shards) == (report.nbytes, report.parameters, report.shards)
    layers = [split_layer(move.name)[0] for move in plan.moves]
    assert layers[0] is None and layers[-1] is None and layers[1:-2] == sorted(layers[1:-2])


def test_imports_are_light():
    code = """
        import sys
        import solar_mega.artifact.grow, solar_mega.artifact.verify, solar_mega.artifact.inspect
        heavy = {"torch", "numpy", "transformers", "megatron", "safetensors"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
