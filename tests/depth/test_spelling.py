"""Layer maps as they are written: every operator against its definition, and refusals."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.depth.layer_map import MAX_LAYERS, LayerMap, depth_up_scaling
from solar_mega.depth.modifiers import IDENTITY_BLOCK
from solar_mega.errors import UserError
from tests.depth.strategies import depth_and_m, depths, maps


class TestSpellings:
    @pytest.mark.parametrize(
        "text, targets",
        [
            ("identity", (0, 1, 2, 3)),
            ("dus:1", (0, 1, 2, 1, 2, 3)),
            ("dus:0", (0, 1, 2, 3, 0, 1, 2, 3)),
            ("dus:3", (0, 3)),
            ("stack:1", (0, 1, 2, 3)),
            ("stack:3", (0, 1, 2, 3) * 3),
            ("0,1,2,1,2,3", (0, 1, 2, 1, 2, 3)),
            ("2", (2,)),
            ("slices:0-3,1-4", (0, 1, 2, 1, 2, 3)),
            ("slices:3-4, 0-1", (3, 0)),
            (" dus:1 ", (0, 1, 2, 1, 2, 3)),
        ],
    )
    def test_targets(self, text, targets):
        assert LayerMap.parse(text, 4).targets == targets

    def test_equality_is_about_what_a_map_does(self):
        spelled = [LayerMap.parse(text, 32) for text in ("dus:8", "slices:0-24,8-32")]
        assert spelled[0] == spelled[1] and len(set(spelled)) == 1
        assert spelled[0].spelling != spelled[1].spelling
        assert spelled[0] != LayerMap(33, spelled[0].targets)

    @given(maps(fresh=False))
    def test_made_maps_spell_themselves(self, made):
        assert LayerMap.parse(made.spelling, made.source_layers) == made

    @given(depths, st.integers(1, 4))
    def test_shortest_spelling(self, n, copies):
        assert LayerMap(n, tuple(range(n))).spelling == "identity"
        if n > 1 and copies > 1:
            assert LayerMap(n, tuple(range(n)) * copies).spelling == f"stack:{copies}"
        assert LayerMap(32, depth_up_scaling(32, 8)).spelling == "dus:8"

    @pytest.mark.parametrize(
        "text, n, said",
        [
            ("dus:4", 4, ["m = 4", "from 0 to 3"]),
            ("dus:-1", 4, ["m = -1", "from 0 to 3"]),
            ("dus:x", 4, ['"x"', "dus:M"]),
            ("dus", 4, ["whole number"]),
            ("dus:1.5", 4, ['"1.5"']),
            ("dsu:1", 4, ['did you mean "dus"', "slices:0-24,8-32"]),
            ("stack:0", 4, ["stacked 0 times"]),
            ("stack:100000000", 4, [str(MAX_LAYERS)]),
            ("0,1,9,x,-2", 4, ["layer 9 does not exist", '"x"', '"-2"', "3 problems"]),
            ("0-2,1-3", 4, ["slices:0-3", "slices:1-4", "2 problems"]),
            ("slices:0-5,3-3,a", 4, ["0-5", "3-3 is empty", '"a"', "3 problems"]),
            ("", 4, ["allowed"]),
            ("0,,1", 4, ['""']),
            ("nonsense:" + "9" * 5000, 4, ["allowed"]),
        ],
    )
    def test_bad_spellings_fit_on_a_screen_and_say_what_is_allowed(self, text, n, said):
        with pytest.raises(UserError) as caught:
            LayerMap.parse(text, n)
        message = str(caught.value)
        assert "model.layer_map (--layer-map)" in message and f"{n} layers" in message
        for words in said:
            assert words in message
        assert len(message.splitlines()) <= 20 and len(message) < 2000

    @given(st.text(max_size=30), depths)
    def test_any_text_is_a_map_or_a_user_error(self, text, n):
        with contextlib.suppress(UserError):
            assert len(LayerMap.parse(text, n)) >= 1


class TestRivals:
    """Every operator against its definition, written out."""

    @pytest.mark.parametrize(
        "text, targets",
        [
            ("interleave:2", (0, 0, 1, 1, 2, 2, 3, 3)),
            ("interleave:1", (0, 1, 2, 3)),
            ("interleave:3@1-3", (0, 1, 1, 1, 2, 2, 2, 3)),
            ("repeat:1-3", (0, 1, 2, 1, 2, 3)),
            ("repeat:1-3x3", (0, 1, 2, 1, 2, 1, 2, 3)),
            ("repeat:0-4", (0, 1, 2, 3, 0, 1, 2, 3)),
            ("llama-pro:2", (0, 1, 1, 2, 3, 3)),
            ("llama-pro:1", (0, 1, 2, 3, 3)),
            ("append:2", (0, 1, 2, 3, 3, 3)),
            ("mean", (0, (0, 1), 1, (1, 2), 2, (2, 3), 3)),
            ("mean:1-3", (0, 1, (1, 2), 2, 3)),
            ("0,1~2,3", (0, (1, 2), 3)),
            ("0,3~1~1", (0, (1, 1, 3))),
            ("2~2,1~1~3~3", (2, (1, 3))),
        ],
    )
    def test_targets(self, text, targets):
        assert LayerMap.parse(text, 4).targets == targets

    @given(depth_and_m())
    def test_depth_up_scaling_repeats_the_middle(self, case):
        n, m = case
        if 2 * m < n:
            assert LayerMap.parse(f"repeat:{m}-{n - m}", n) == LayerMap.parse(f"dus:{m}", n)

    def test_llama_pro_of_the_paper(self):
        """32 layers to 40 in 8 groups (arXiv 2401.02415, section 3.2), the added ones doing nothing yet."""
        grown = LayerMap.parse("llama-pro:8", 32)
        added = (4, 9, 14, 19, 24, 29, 34, 39)
        assert len(grown) == 40 and grown.changed == added and grown.preserves_function
        assert all(grown.modifiers[g] == IDENTITY_BLOCK for g in added)
        assert LayerMap.parse("llama-pro:8+freeze@originals", 32).frozen == tuple(
            g for g in range(40) if g not in added
        )

    @pytest.mark.parametrize(
        "text, preserved",
        [
            ("identity", True),
            ("identity+freeze", True),
            ("append:3", True),
            ("repeat:1-3+scale:0@3-5", True),
            ("repeat:1-3+o_proj:0@3-5", False),
            ("llama-pro:2+noise:0.1@copies", False),
            ("dus:1", False),
            ("mean", False),
            ("identity+noise:0.1@0", False),
        ],
    )
    def test_what_preserves_the_function(self, text, preserved):
        assert LayerMap.parse(text, 4).preserves_function is preserved
