"""Model directories: configs through a layer map (checked against transformers), side files, refusals."""

import json
import shutil

import pytest

from solar_mega.artifact.hf import (
    POSITIONAL_KEYS,
    HFDirectory,
    grown_config,
    layer_name,
    split_layer,
    write_config,
)
from solar_mega.artifact.safetensors_reader import SafetensorsReader
from solar_mega.artifact.safetensors_writer import ShardedWriter
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError


def rewrite(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    write_config(directory, {key: value for key, value in (config | changes).items() if value != "absent"})


def without(directory, *dropped):
    """Rewrites the weights of `directory` lacking some tensors."""
    with SafetensorsReader(directory) as reader:
        kept = {name: reader.read(name) for name in reader.infos if name not in dropped}
        plan = [(name, reader.infos[name].dtype, t.shape) for name, t in kept.items()]
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    with ShardedWriter(directory) as writer:
        writer.plan(plan)
        for name, tensor in kept.items():
            writer.write(name, tensor)


class TestDirectory:
    def test_what_it_is(self, llama):
        directory = HFDirectory(llama)
        assert (directory.architecture, directory.num_layers) == ("LlamaForCausalLM", 6)
        assert directory.side_files == ("generation_config.json", "special_tokens_map.json", "tokenizer.json")
        assert directory.weight_problems() == []

    def test_side_files_are_followed_and_complete(self, llama, tmp_path):
        (tmp_path / "blob").write_bytes(b"\0\1")
        (llama / "tokenizer.model").symlink_to(tmp_path / "blob")
        (llama / "chat_templates").mkdir()
        (llama / "chat_templates" / "tools.jinja").write_text("{}")
        for name in ("merges.txt", "vocab.json", "LICENSE", "chat_template.jinja", "added_tokens.json"):
            (llama / name).write_text(name)
        for name in ("optimizer.pt", "README.md", "lineage.json", ".hidden", "modeling_x.py"):
            (llama / name).write_text(name)
        target = tmp_path / "copy"
        target.mkdir()
        HFDirectory(llama).copy_side_files(target)
        copied = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
        assert copied == {
            *("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
            *("merges.txt", "vocab.json", "LICENSE", "chat_template.jinja", "added_tokens.json"),
            "chat_templates/tools.jinja",
        }
        assert not (target / "tokenizer.model").is_symlink()
        rewrite(llama, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
        assert "modeling_x.py" in HFDirectory(llama).side_files, "remote code is needed to load such a model"

    def test_what_is_not_a_model_directory(self, tmp_path):
        with pytest.raises(UserError, match="not a directory.*hf download upstage/SOLAR-10.7B-v1.0"):
            HFDirectory("upstage/SOLAR-10.7B-v1.0")
        with pytest.raises(UserError, match="no config.json"):
            HFDirectory(tmp_path)

    @pytest.mark.parametrize(
        "text, said",
        [
            ("{", "cannot be read"),
            ("[]", "JSON object"),
            ("{}", "2 problems"),
            ('{"architectures": [], "num_hidden_layers": 2}', "LlamaForCausalLM"),
            ('{"architectures": ["A"], "num_hidden_layers": true}', "num_hidden_layers"),
            ('{"architectures": ["A"], "text_config": {}}', "only text models"),
        ],
    )
    def test_bad_configs(self, tmp_path, text, said):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            HFDirectory(tmp_path)

    def test_weights_that_do_not_fit_the_config(self, llama):
        rewrite(llama, num_hidden_layers=7)
        with pytest.raises(UserError, match="says 7 layers, the weights have 6 .0 to 5."):
            HFDirectory(llama).check_weights()
        rewrite(llama, num_hidden_layers=5)
        with pytest.raises(UserError, match="says 5 layers"):
            HFDirectory(llama).check_weights()

    def test_lost_tensors_are_named(self, llama):
        lost = ("model.layers.3.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight")
        without(llama, *lost)
        with pytest.raises(UserError) as caught:
            HFDirectory(llama).check_weights()
        assert all(f"{name} is missing" in str(caught.value) for name in lost)
        rewrite(llama, tie_word_embeddings=True)
        assert "lm_head.weight is missing" not in HFDirectory(llama).weight_problems()

    def test_other_layouts_are_named(self, llama):
        names = list(HFDirectory(llama).tensors.infos)
        without(llama, *[name for name in names if "layers" in name])
        with pytest.raises(UserError, match="no tensor is named model.layers.N"):
            HFDirectory(llama).check_weights()

    def test_pickled_weights(self, llama):
        for file in [*llama.glob("*.safetensors"), *llama.glob("*.index.json")]:
            file.unlink()
        (llama / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match="pytorch_model.bin: truncated"):
            HFDirectory(llama).check_weights()

    def test_names(self):
        assert split_layer("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
        assert split_layer("model.embed_tokens.weight") == (None, "model.embed_tokens.weight")
        assert split_layer("vision.model.layers.1.x")[0] is None
        assert layer_name(12, "mlp.up_proj.weight") == "model.layers.12.mlp.up_proj.weight"


class TestGrownConfig:
    dus = LayerMap.parse("dus:1", 4)  # 0 1 2 1 2 3

    def test_depth_and_nothing_else(self):
        config = {"num_hidden_layers": 4, "hidden_size": 8, "rope_scaling": {"factor": [1, 2, 3, 4]}}
        kept = json.dumps(config)
        assert grown_config(config, self.dus) == config | {"num_hidden_layers": 6}
        assert json.dumps(config) == kept, "the argument is not changed"

    def test_per_layer_lists_follow_the_map(self):
        config = {
            "num_hidden_layers": 4,
            "layer_types": ["a", "b", "c", "d"],
            "num_key_value_heads": [1, 2, 3, 4],
        }
        grown = grown_config(config, self.dus)
        assert grown["layer_types"] == ["a", "b", "c", "b", "c", "d"]
        assert grown["num_key_value_heads"] == [1, 2, 3, 2, 3, 4]

    def test_lists_that_are_not_about_layers_stay(self):
        config = {"num_hidden_layers": 1, "architectures": ["A"], "eos_token_id": [7], "suppress_tokens": [1]}
        assert grown_config(config, LayerMap.parse("stack:2", 1)) == config | {"num_hidden_layers": 2}

    @pytest.mark.parametrize("window, use", [(3, True), (3, False), (4, False), (0, True), (70, False)])
    @pytest.mark.parametrize("spelling", ["dus:1", "dus:3", "stack:2", "3,2,1,0"])
    def test_qwen_windows_as_transformers_understands_them(self, window, use, spelling):
        from transformers import Qwen2Config

        layer_map = LayerMap.parse(spelling, 4)
        config = Qwen2Config(
            num_hidden_layers=4,
            use_sliding_window=use,
            sliding_window=8,
            max_window_layers=window,
            hidden_size=8,
        ).to_dict()
        expected = [config["layer_types"][source] for source in layer_map]
        for given in (config, {key: value for key, value in config.items() if key != "layer_types"}):
            given = dict(given, use_sliding_window=use, sliding_window=8)
            grown = grown_config(given, layer_map)
            assert Qwen2Config(**grown).layer_types == expected
            assert grown["max_window_layers"] == sum(source < window for source in layer_map)

    @pytest.mark.parametrize("family", ["Gemma2Config", "Gemma3TextConfig", "Cohere2Config"])
    def test_windows_by_layer_number_are_spelled_out(self, family):
        import transformers

        kind = getattr(transformers, family)
        layer_map = LayerMap.parse("dus:3", 14)  # an odd m shifts every pattern
        types = kind(num_hidden_layers=14).layer_types
        implicit = {"model_type": kind.model_type, "num_hidden_layers": 14}
        assert grown_config(implicit, layer_map)["layer_types"] == [types[source] for source in layer_map]
        assert grown_config(implicit, LayerMap.parse("identity", 14)) == implicit

    @pytest.mark.parametrize("key", POSITIONAL_KEYS)
    def test_kinds_of_layers_by_number_are_refused(self, key):
        config = {"num_hidden_layers": 4, key: 2}
        with pytest.raises(UserError, match=f"{key} = 2"):
            grown_config(config, self.dus)
        assert grown_config(config, LayerMap.parse("identity", 4)) == config
        for harmless in (0, None, [], False):
            assert grown_config(config | {key: harmless}, self.dus)["num_hidden_layers"] == 6

    def test_one_in_n_is_harmless_only_where_it_means_every(self):
        assert grown_config({"num_hidden_layers": 4, "decoder_sparse_step": 1}, self.dus)
        with pytest.raises(UserError, match="first_k_dense_replace"):
            grown_config({"num_hidden_layers": 4, "first_k_dense_replace": 1}, self.dus)

    def test_the_wrong_depth(self):
        with pytest.raises(UserError, match="for 4 layers, num_hidden_layers is 5"):
            grown_config({"num_hidden_layers": 5}, self.dus)


def test_a_link_to_a_snapshot_works(llama, tmp_path):
    """As in the Hugging Face cache: every file a link to a blob."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(llama.iterdir()):
        blob = tmp_path / f"blob{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert HFDirectory(snapshot).weight_problems() == []
