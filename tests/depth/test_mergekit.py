"""Layer maps from mergekit's passthrough recipes."""

import pytest

from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError

RECIPE = """
slices:
  - sources:
      - model: some/base
        layer_range: [0, 2]
  - sources:
      - model: some/base
        layer_range: [1, 2]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources:
      - model: some/base
        layer_range: [2, 4]
  - sources:
      - model: some/base
        layer_range: [3, 4]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""


class TestMergekit:
    def test_the_recipe_for_llama_pro(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        read = LayerMap.parse(str(path), 4)
        assert read == LayerMap.parse("llama-pro:2", 4)
        assert LayerMap.parse(read.spelling, 4) == read, "the spelling does not need the file"
        frozen = LayerMap.parse(f"{path}+freeze@originals", 4)
        assert frozen == LayerMap.parse("llama-pro:2+freeze@originals", 4)

    def test_depth_up_scaling(self, tmp_path):
        path = tmp_path / "solar.yml"
        source = "  - sources:\n    - {{model: m, layer_range: [{}, {}]}}\n"
        path.write_text(
            "slices:\n" + source.format(0, 24) + source.format(8, 32) + "merge_method: passthrough\n"
        )
        assert LayerMap.parse(str(path), 32) == LayerMap.parse("dus:8", 32)

    @pytest.mark.parametrize(
        "old, new, said",
        [
            ("passthrough", "slerp", "'slerp'"),
            ("[0, 2]", "[0, 9]", r"\[0, 9\] is outside"),
            ("[0, 2]", "2", "layer_range = 2"),
            ("filter: o_proj", "filter: q_proj", "q_proj"),
            ("value: 1.0", "value: 0.5", "norms too"),
            ("value: 0.0", "value: [0, 1]", "write numbers"),
            (
                "model: some/base\n        layer_range: [0, 2]",
                "model: other\n        layer_range: [0, 2]",
                "2 m",
            ),
            ("scale:", "weight:", "weight"),
            ("slices:", "models:", "slices"),
            ("slices:", "slices: [", "not YAML"),
        ],
    )
    def test_recipes_that_are_no_map(self, tmp_path, old, new, said):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace(old, new))
        with pytest.raises(UserError, match=said):
            LayerMap.parse(str(path), 4)
