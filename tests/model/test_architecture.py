"""Architectures of all families against transformers' own reading of a config, and what is refused."""

import pytest
import torch

from solar_mega.checkpoint.from_hf import check_source
from solar_mega.checkpoint.names import hf_shapes
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.model.architecture import Architecture
from solar_mega.model.families import FAMILIES
from tests.families import FAMILIES as TINY

SIZES = dict(
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


def config_of(name: str, **options):
    import transformers

    return getattr(transformers, name.replace("ForCausalLM", "Config"))(**options)


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_names_shapes_and_parameters_are_transformers(self, name):
        import transformers

        config = config_of(name, **SIZES, pad_token_id=None)
        arch = Architecture.from_hf({**config.to_dict(), "architectures": [name]})
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        theirs = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
        assert hf_shapes(arch) == theirs
        assert arch.parameters() == model.num_parameters()

    def test_what_a_config_leaves_unsaid(self, name):
        """config.json of old checkpoints holds little; transformers fills in its defaults, and so do we."""
        said = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        said["num_attention_heads"] = 32
        theirs = config_of(name, **said)
        ours = Architecture.from_hf({**said, "architectures": [name], "model_type": theirs.model_type})
        assert ours.num_query_groups == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        assert ours.sliding_window == getattr(theirs, "sliding_window", None) and not ours.windowed

    def test_it_has_a_tiny_model_to_compare_logits_with(self, name):
        assert name.replace("ForCausalLM", "") in {kind for kind, _ in TINY.values()}


class TestWindows:
    base = {
        **SIZES,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "sliding_window": 8,
    }

    def read(self, **options):
        return Architecture.from_hf({**self.base, "use_sliding_window": True, **options})

    def test_which_layers_have_one(self):
        assert self.read(max_window_layers=1).windowed == (False, True, True, True)
        assert self.read(max_window_layers=0).windowed == ()
        assert self.read(max_window_layers=0).sliding_window == 8
        assert self.read(max_window_layers=4).sliding_window is None
        assert self.read(use_sliding_window=False, max_window_layers=1).sliding_window is None
        kinds = ["full_attention", "sliding_attention"] * 2
        assert self.read(layer_types=kinds).windowed == (False, True, False, True)

    @pytest.mark.parametrize("spelling", ["dus:1", "interleave:2", "llama-pro:2", "mean:1-4", "3,0~0,0"])
    def test_they_follow_the_map(self, spelling):
        """The grown architecture, its config read again, and transformers agree layer by layer."""
        layer_map = LayerMap.parse(spelling, 4)
        grown = self.read(max_window_layers=1).grown(layer_map)
        expected = tuple(layer_map.sources_of(g)[0] >= 1 for g in range(len(layer_map)))
        assert grown.windowed == expected
        assert Architecture.from_hf(grown.hf_config) == grown
        theirs = config_of("Qwen2ForCausalLM", **grown.hf_config)
        assert tuple(kind == "sliding_attention" for kind in theirs.layer_types) == expected

    def test_a_default_first_window_is_spelled_out(self):
        """Without max_window_layers transformers takes 28, which would mean other layers once copied."""
        deep = self.read(num_hidden_layers=32)
        grown = deep.grown(LayerMap.parse("dus:8", 32))
        assert grown.windowed == tuple(layer >= 28 for layer in LayerMap.parse("dus:8", 32))
        assert Architecture.from_hf(grown.hf_config) == grown

    def test_means_over_different_kinds_are_refused(self):
        with pytest.raises(UserError, match="mean of layers"):
            self.read(max_window_layers=1).grown(LayerMap.parse("mean", 4))

    @pytest.mark.parametrize("kinds", [["full_attention"] * 3, ["chunked_attention"] * 4])
    def test_bad_lists(self, kinds):
        with pytest.raises(UserError, match="layer_types has"):
            self.read(layer_types=kinds)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "said"),
        [
            (dict(architectures=["MixtralForCausalLM"], num_local_experts=8), ["mixture of experts"]),
            (
                dict(
                    architectures=["Gemma2ForCausalLM"],
                    attn_logit_softcapping=50.0,
                    final_logit_softcapping=30.0,
                    query_pre_attn_scalar=256,
                ),
                ["soft-capped attention scores", "soft-capped logits", "scaled by a setting"],
            ),
            (dict(architectures=["PhiForCausalLM"], layer_norm_eps=1e-5), ["LayerNorm"]),
            (dict(architectures=["NewForCausalLM"]), ["Phi3ForCausalLM", "model/families.py"]),
        ],
    )
    def test_unsupported_families_say_what_is_missing(self, config, said):
        with pytest.raises(UserError) as caught:
            Architecture.from_hf({**SIZES, **config})
        for words in (config["architectures"][0], *said):
            assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("Phi3ForCausalLM", dict(rope_scaling={"type": "longrope"}), "longrope"),
            ("Phi3ForCausalLM", dict(partial_rotary_factor=0.75), "partial_rotary_factor"),
            ("Qwen3ForCausalLM", dict(attention_bias=True), "attention_bias"),
            ("LlamaForCausalLM", dict(mlp_bias=True), "mlp_bias"),
            ("MistralForCausalLM", dict(sliding_window=8, layer_types=["full_attention"] * 3), "layer_types"),
        ],
    )
    def test_options_that_are_not_carried(self, name, options, said):
        with pytest.raises(UserError, match=said):
            Architecture.from_hf({**SIZES, **options, "architectures": [name]})

    def test_tensors_that_would_be_lost(self, tmp_path):
        """A Qwen 3 checkpoint under a Llama config: its head norms have no place."""
        from solar_mega.artifact.hf import HFDirectory
        from tests.families import make_family

        reader = HFDirectory(make_family("qwen3", tmp_path)).tensors
        llama = Architecture.from_hf(
            {**HFDirectory(tmp_path / "qwen3").config, "architectures": ["LlamaForCausalLM"]}
        )
        with pytest.raises(UserError, match="q_norm.weight is not part of a llama layer"):
            check_source(reader, llama, "here")
