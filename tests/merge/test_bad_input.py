"""What cannot be merged is refused before anything is written, with everything that is wrong at once."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from solar_mega.__main__ import main
from solar_mega.artifact.lineage import directory_hash, read_lineage
from solar_mega.errors import UserError
from solar_mega.merge.plan import plan_merge
from solar_mega.merge.recipe import MergeConfig, recipe_of
from solar_mega.merge.run import merge
from tests.merge.conftest import make_model


def plan(models, method="linear", out="unused", **options):
    return plan_merge(recipe_of(MergeConfig(out=out, method=method, models=tuple(models), **options)))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(directory, name, change):
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})


def test_other_shape_and_vocabulary(family, tmp_path):
    other = make_model(tmp_path / "other", 7, vocab_size=2000, intermediate_size=128)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"t5": 5', '"t5": 3000'))
    with pytest.raises(UserError) as error:
        plan([family["a"], other])
    for said in (
        "vocab_size of",
        "is 2000, of",
        "intermediate_size",
        "1 tokens have other ids",
        "'t5' is 5 and 3000",
        "model.embed_tokens.weight: [2000, 96]",
        "more tensors of other shapes",
    ):
        assert said in str(error.value), said


def test_a_file_that_cannot_be_hashed_ends_the_merge(family, copy_of, tmp_path):
    other = copy_of("b")
    (other / "notes.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="notes.txt cannot be read"):
        merge(plan([family["a"], other]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_and_an_extra_tensor(family, copy_of):
    other = copy_of("b")
    edit_config(other, tie_word_embeddings=True)
    index = other / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for file in set(content["weight_map"].values()):
        tensors = load_file(other / file)
        tensors.pop("lm_head.weight", None)
        save_file(tensors, other / file, metadata={"format": "pt"})
    content["weight_map"].pop("lm_head.weight")
    files = set(content["weight_map"].values())
    for file in other.glob("*.safetensors"):
        if file.name not in files:
            file.unlink()
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lacks lm_head.weight"):
        plan([family["a"], other])


def test_integers_are_not_weights(family, copy_of):
    other = copy_of("b")
    edit_tensor(other, "model.norm.weight", lambda t: t.to(torch.int8))
    with pytest.raises(UserError, match="model.norm.weight are I8; only F64, F32, F16, BF16 weights"):
        plan([family["a"], other])


def test_directories_that_are_not_models(family, tmp_path):
    with pytest.raises(UserError) as error:
        plan([tmp_path / "none", tmp_path])
    assert "none is not a directory" in str(error.value) and "neither config.json (Hugging Face) nor" in str(
        error.value
    )


def test_flags_that_do_not_fit(family):
    with pytest.raises(UserError) as error:
        recipe_of(
            MergeConfig(
                out="x",
                method="slerp",
                models=(family["a"],),
                weights=(1.0,),
                t=(1.5,),
                base=family["base"],
                density=0.5,
            )
        )
    for said in (
        "merges two models, got 1",
        "weights are not used",
        "t = 1.5 is outside",
        "base is not used by slerp",
        "density = 0.5 means nothing",
    ):
        assert said in str(error.value), said
    with pytest.raises(UserError, match="ties needs base"):
        recipe_of(MergeConfig(out="x", method="ties", models=(family["a"], family["b"])))
    with pytest.raises(UserError, match="2 given for 3 models"):
        recipe_of(MergeConfig(out="x", method="linear", models=tuple(family.values()), weights=(0.5, 0.5)))


def test_weights_that_do_not_sum_to_one_are_warned_of(family, tmp_path, capsys):
    words = ["merge", "--out", str(tmp_path / "out"), "--method", "linear"]
    words += ["--models", str(family["a"]), str(family["b"]), "--weights", "0.6", "0.6"]
    assert main([*words, "--dry-run"]) == 0
    assert "warning: weights sum to 1.2, not 1" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--normalize"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_normalized(family):
    with pytest.raises(UserError, match="sum to 0"):
        plan([family["a"], family["b"]], weights=(1.0, -1.0), normalize=True)


def test_settings_that_compute_differently_are_warned_of(family, copy_of):
    other = copy_of("b")
    edit_config(other, rms_norm_eps=1e-3)
    (text,) = plan([family["a"], other]).warnings
    assert text.startswith("rms_norm_eps of") and "is 0.001; the result takes 1e-06" in text


def test_nan_weights_are_named(family, copy_of, tmp_path):
    other = copy_of("b")

    def spoil(tensor):
        tensor[1, 5] = float("nan")
        return tensor

    edit_tensor(other, "model.layers.2.mlp.up_proj.weight", spoil)
    out = tmp_path / "place" / "out"
    with pytest.raises(UserError, match=r"model.layers.2.mlp.up_proj.weight: element 101 is not finite"):
        merge(plan([family["a"], other]), out)
    assert os.listdir(out.parent) == [], "nothing unfinished stays"
    with pytest.raises(UserError, match=r"model.layers.2.mlp.up_proj.weight"):
        merge(plan([family["a"], other], "slerp"), out)


def test_values_beyond_the_dtype(family, copy_of, tmp_path):
    large = copy_of("a")
    edit_tensor(large, "model.norm.weight", lambda t: t * 0 + 3e5)
    with pytest.raises(UserError, match="model.norm.weight: merged values up to .*more than F16 holds"):
        merge(plan([large, family["b"]], dtype="fp16"), tmp_path / "out")


@pytest.mark.parametrize("place", ["inside", "occupied"])
def test_places_to_write(family, copy_of, tmp_path, place):
    model = copy_of("a")
    out = model / "merged" if place == "inside" else family["b"]
    before = directory_hash(family["b"])
    with pytest.raises(UserError, match="lies inside the model" if place == "inside" else "is not empty"):
        merge(plan([model, family["b"]]), out)
    assert directory_hash(family["b"]) == before


def test_the_result_loads_and_knows_its_parents(family, tmp_path):
    import transformers

    out = tmp_path / "out"
    toml = tmp_path / "merge.toml"
    toml.write_text(
        f'method = "slerp"\nmodels = ["{family["a"]}", "{family["b"]}"]\nt = [0.2, 0.8]\nout = "{out}"\n'
    )
    assert main(["merge", "--config", str(toml)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    lineage = read_lineage(out)
    assert [parent.path for parent in lineage.parents] == [str(family["a"]), str(family["b"])]
    assert lineage.parents[0].hash == directory_hash(family["a"])
    assert lineage.config["recipe"]["t"] == [0.2, 0.8]
    angles = json.loads((out / "merge_report.json").read_text())
    assert len(angles["tensors"]) == len(plan([family["a"], family["b"]]).jobs)
    assert "merged by `slerp`" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").exists()


def test_slices_make_another_depth(family, tmp_path):
    import transformers

    recipe = tmp_path / "recipe.yml"
    a, b = family["a"], family["b"]
    recipe.write_text(f"""
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 3], parameters: {{weight: 1}}}}
      - {{model: {b}, layer_range: [1, 4], parameters: {{weight: 0}}}}
  - sources:
      - {{model: {a}, layer_range: [1, 4], parameters: {{weight: 0}}}}
      - {{model: {b}, layer_range: [1, 4], parameters: {{weight: 1}}}}
""")
    assert main(["merge", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, left, right = (load(path).model.layers for path in (tmp_path / "out", a, b))
    assert len(ours) == 6
    for target, source in enumerate([*left[:3], *right[1:]]):
        for x, y in zip(ours[target].parameters(), source.parameters(), strict=True):
            assert torch.equal(x, y)
