"""LayerMap: the paper's equation, its properties for any depth, spellings, drawings and refusals."""

import contextlib
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.depth.layer_map import MAX_LAYERS, LayerMap, Seam, depth_up_scaling
from solar_mega.depth.modifiers import IDENTITY_BLOCK, Modifier
from solar_mega.errors import UserError

depths = st.integers(1, 80)


@st.composite
def depth_and_m(draw):
    n = draw(depths)
    return n, draw(st.integers(0, n - 1))


@st.composite
def maps(draw, n=None, fresh=True):
    n = draw(depths) if n is None else n
    layer = st.integers(0, n - 1)
    return LayerMap(n, tuple(draw(st.lists(layer | st.none() if fresh else layer, min_size=1, max_size=60))))


class TestThePaper:
    """Section 2 of arXiv 2312.15166, with its numbers."""

    def test_solar(self):
        solar = LayerMap.parse("dus:8", 32)
        assert solar.targets == (*range(24), *range(8, 32))
        assert len(solar) == 48
        assert solar.seams == (Seam(position=24, before=23, after=8),)
        assert solar.seams[0].distance == 15

    def test_plain_repetition_has_the_largest_distance(self):
        (seam,) = LayerMap.parse("stack:2", 32).seams
        assert (seam.position, seam.distance) == (32, 31)

    @given(depth_and_m())
    def test_depth_up_scaling(self, case):
        n, m = case
        grown = LayerMap.parse(f"dus:{m}", n)
        assert len(grown) == 2 * (n - m)
        assert grown.targets[: n - m] == tuple(range(n - m)), "the model without its last m layers"
        assert grown.targets[n - m :] == tuple(range(m, n)), "its copy without its first m layers"
        if 2 * m == n:
            assert grown.is_identity and not grown.seams
        else:
            (seam,) = grown.seams
            assert seam.position == n - m
            assert seam.distance == abs((n - 1) - 2 * m)

    @given(depths)
    def test_no_m_beats_plain_repetition_in_distance(self, n):
        doubled = abs(n - 1)
        for m in range(n):
            assert all(seam.distance <= doubled for seam in LayerMap(n, depth_up_scaling(n, m)).seams)

    @given(depths, st.integers(-100, 200))
    def test_impossible_m_is_refused(self, n, m):
        if 0 <= m < n:
            assert len(depth_up_scaling(n, m)) == 2 * (n - m)
        else:
            with pytest.raises(UserError, match=f"m = {m} .*from 0 to {n - 1}"):
                depth_up_scaling(n, m)


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


class TestValue:
    @given(maps())
    def test_json_round_trip(self, made):
        again = LayerMap.from_json(json.loads(json.dumps(made.to_json())))
        assert again == made and again.spelling == made.spelling

    @pytest.mark.parametrize(
        "change, said",
        [
            ({"scales": [1.0]}, 'unknown key "scales"'),
            ({"targets": [0, "1"]}, "'1'"),
            ({"targets": None}, '"targets"'),
            ({"source_layers": True}, '"source_layers"'),
            ({"targets": [7]}, "layer 7 does not exist"),
            ({"targets": []}, "at least one"),
        ],
    )
    def test_json_that_is_not_ours(self, change, said):
        with pytest.raises(UserError, match=said):
            LayerMap.from_json({**LayerMap.parse("dus:1", 4).to_json(), **change})
        with pytest.raises(UserError):
            LayerMap.from_json([1])

    @given(st.data())
    def test_compose_is_growing_twice(self, data):
        first = data.draw(maps())
        second = data.draw(maps(n=len(first)))
        both = first.compose(second)
        model = [f"layer {i}" for i in range(first.source_layers)]

        def grow(layers, layer_map):
            return ["new" if t is None else layers[t] for t in layer_map]

        assert grow(model, both) == grow(grow(model, first), second)
        assert both.source_layers == first.source_layers

    def test_compose_needs_the_right_depth(self):
        with pytest.raises(UserError, match="32 layers"):
            LayerMap.parse("dus:8", 32).compose(LayerMap.parse("dus:8", 32))

    @given(maps())
    def test_copies_seams_and_runs_agree(self, made):
        for source in range(made.source_layers):
            assert made.copies_of(source) == tuple(g for g in range(len(made)) if made[g] == source)
        assert sum(run.length for run in made.runs) == len(made)
        assert len(made.runs) == len(made.seams) + 1
        for run in made.runs:
            expected = [None if run.source is None else run.source + i for i in range(run.length)]
            assert list(made.targets[run.target : run.target + run.length]) == expected
        assert made.fresh == tuple(g for g, source in enumerate(made) if source is None)

    @given(maps(fresh=False))
    def test_remap_list_follows_the_map(self, made):
        values = [object() for _ in range(made.source_layers)]
        assert made.remap_list(values) == [values[source] for source in made]

    def test_remap_list_with_fresh_layers_takes_the_neighbour(self):
        assert LayerMap(3, (None, 1, None, 2)).remap_list("abc") == ["b", "b", "b", "c"]
        with pytest.raises(UserError, match="fresh"):
            LayerMap(3, (None, None)).remap_list("abc")
        with pytest.raises(UserError, match="2 entries for 3"):
            LayerMap.parse("identity", 3).remap_list("ab")

    def test_fresh_layers_make_seams_without_a_distance(self):
        seams = LayerMap(4, (0, 1, None, None, 2, 3)).seams
        assert [(s.position, s.before, s.after, s.distance) for s in seams] == [
            (2, 1, None, None),
            (4, None, 2, None),
        ]

    def test_is_immutable_and_hashable(self):
        made = LayerMap(4, [0, 1])
        assert made.targets == (0, 1) and hash(made) == hash(LayerMap(4, (0, 1)))
        with pytest.raises(AttributeError):
            made.targets = ()

    @pytest.mark.parametrize(
        "n, targets", [(0, (0,)), (4, ()), (4, (4,)), (4, (-1,)), (4, (0,) * (MAX_LAYERS + 1))]
    )
    def test_impossible_maps(self, n, targets):
        with pytest.raises(UserError):
            LayerMap(n, targets)


class TestDrawing:
    def test_a_person_sees_the_copies_the_seam_and_the_distance(self):
        lines = LayerMap.parse("dus:8", 32).describe().splitlines()
        assert lines[0] == (
            "48 layers from 32: 0..23 | 8..31, seam after layer 23: source 23 -> 8, layer distance 15"
        )
        first, second = (line.index("=") for line in lines[3:5])
        assert second - first == 8, "the copy starts 8 columns further right"
        assert lines[3].count("=") == lines[4].count("=") == 24
        assert lines[-1] == "source layers: used twice 8..23; used once 0..7, 24..31"

    def test_what_is_dropped_is_said(self):
        assert "dropped 12..19" in LayerMap.parse("dus:20", 32).describe()
        assert "no seam" in LayerMap.parse("identity", 32).describe()
        assert "layer distance 31" in LayerMap.parse("stack:2", 32).describe()

    @given(maps())
    def test_any_map_fits_on_a_screen(self, made):
        lines = made.describe().splitlines()
        assert len(lines) <= 20
        assert all(line.isascii() for line in lines)
        assert max(len(line) for line in lines[1:-1]) <= 110


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


class TestModifiers:
    def test_changes_and_their_places(self):
        grown = LayerMap.parse("dus:1+scale:0.5@3-6+o_proj:2@3,5+noise:0.01:7@copies+freeze@originals", 4)
        plain, low, high = Modifier(freeze=True), Modifier(1.0, 0.5, 0.01, 7), Modifier(0.5, 0.5, 0.01, 7)
        last = Modifier(1.0, 0.5, freeze=True)
        assert grown.targets == (0, 1, 2, 1, 2, 3)
        assert grown.modifiers == (plain, plain, plain, low, high, last)
        assert grown.changed == (3, 4, 5) and grown.frozen == (0, 1, 2, 5)
        assert LayerMap.parse("mean+freeze@copies", 3).frozen == (1, 3)

    def test_they_count_in_equality(self):
        assert LayerMap.parse("identity+freeze@1", 4) != LayerMap.parse("identity", 4)
        assert LayerMap.parse("append:1", 4) == LayerMap.parse("0,1,2,3,3+scale:0@4", 4)
        assert LayerMap.parse("identity+freeze", 4).is_identity
        assert not LayerMap.parse("identity+scale:2@1", 4).is_identity

    @given(maps(), st.data())
    def test_round_trips(self, made, data):
        number = st.floats(0, 1e30, allow_nan=False)
        modifier = st.builds(Modifier, number, number, number, st.integers(0, 10**18 - 1), st.booleans())
        modifiers = data.draw(st.lists(modifier, min_size=len(made), max_size=len(made)))
        changed = LayerMap(made.source_layers, made.targets, modifiers=tuple(modifiers))
        assert LayerMap.from_json(json.loads(json.dumps(changed.to_json()))) == changed
        assert len(changed.describe().splitlines()) <= 20
        if not changed.fresh:
            spelled = LayerMap.parse(changed.spelling, changed.source_layers)
            seeds = [m.noise_seed if m.noise else 0 for m in modifiers]
            assert [m.noise_seed for m in spelled.modifiers] == seeds
            assert [m.noise for m in spelled.modifiers] == [m.noise for m in modifiers]
            assert [m.o_proj for m in spelled.modifiers] == [m.o_proj for m in modifiers]
            assert [m.down_proj for m in spelled.modifiers] == [m.down_proj for m in modifiers]
            assert spelled.frozen == changed.frozen

    def test_json_of_maps_without_changes_is_as_before(self):
        old = {"source_layers": 4, "targets": [0, 1, 2, 1, 2, 3], "spelling": "dus:1"}
        assert LayerMap.parse("dus:1", 4).to_json() == old
        assert LayerMap.from_json(old) == LayerMap.parse("dus:1", 4)

    @pytest.mark.parametrize(
        "change, said",
        [
            ({"modifiers": [1]}, '"modifiers"'),
            ({"modifiers": {"9": {}}}, "9"),
            ({"modifiers": {"x": {}}}, "'x'"),
            ({"modifiers": {"1": {"scale": 2.0}}}, "scale"),
            ({"modifiers": {"1": {"freeze": 1}}}, "freeze"),
            ({"modifiers": {"1": 3}}, "object"),
            ({"modifiers": {"1": {"noise": -1.0}}}, "noise"),
            ({"targets": [[0]]}, "targets"),
            ({"targets": [[0, 9]]}, "layer 9"),
        ],
    )
    def test_json_that_is_not_ours(self, change, said):
        with pytest.raises(UserError, match=said):
            LayerMap.from_json({**LayerMap.parse("dus:1", 4).to_json(), **change})

    @pytest.mark.parametrize(
        "text, said",
        [
            ("dus:1+frieze", ['did you mean "freeze"', "+noise:STD[:SEED]"]),
            ("dus:1+scale:x", ["+scale:x"]),
            ("dus:1+scale:1e999", ["inf"]),
            ("dus:1+noise:-1", ["standard deviation"]),
            ("dus:1+noise:1+noise:2@0", ["layer 0 has noise already"]),
            ("dus:1+freeze@6", ["0-6"]),
            ("dus:1+freeze@3-3", ['"@3-3"']),
            ("dus:1+freeze@", ['"@"']),
            ("dus:1+", ["allowed"]),
            ("interleave:0", ["0 times"]),
            ("interleave:2@3-9", ["3-9 ends after the last layer"]),
            ("interleave:x", ["interleave:G"]),
            ("repeat:", ["START-END"]),
            ("repeat:1-2,2-3", ["one range"]),
            ("repeat:1-3x99999999", [str(MAX_LAYERS)]),
            ("llama-pro:3", ["1, 2, 4"]),
            ("append:0", ["from 1"]),
            ("mean:2", ["START-END"]),
            ("1~9", ["layer 1~9 does not exist"]),
            ("1~", ['"1~"']),
            ("missing.yaml", ["missing.yaml", "cannot be read"]),
        ],
    )
    def test_bad_changes_say_what_is_allowed(self, text, said):
        with pytest.raises(UserError) as caught:
            LayerMap.parse(text, 4)
        for words in said:
            assert words in str(caught.value)

    @given(st.text("dusmean:+@0123-~,xfrz", max_size=25), depths)
    def test_any_text_is_a_map_or_a_user_error(self, text, n):
        with contextlib.suppress(UserError):
            assert len(LayerMap.parse(text, n)) >= 1


class TestComposeAndLists:
    @given(st.data())
    def test_compose_is_growing_twice(self, data):
        """On a model of one number per layer, with exact fractions."""
        scale = st.sampled_from([Modifier(), Modifier(0.5, 2.0), IDENTITY_BLOCK])

        def draw(n):
            layer = st.integers(0, n - 1)
            target = layer | st.tuples(layer, layer) | st.tuples(layer, layer, layer)
            targets = data.draw(st.lists(target, min_size=1, max_size=8))
            return LayerMap(n, tuple(targets), modifiers=tuple(data.draw(scale) for _ in targets))

        def grow(model, layer_map):
            grown = []
            for g in range(len(layer_map)):
                parts = [model[layer] for layer in layer_map.sources_of(g)]
                mean = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
                scales = (layer_map.modifiers[g].o_proj, layer_map.modifiers[g].down_proj, 1)
                grown.append([value * Fraction(factor) for value, factor in zip(mean, scales, strict=True)])
            return grown

        first = draw(data.draw(st.integers(1, 6)))
        second = draw(len(first))
        model = [[Fraction(7**layer + part) for part in range(3)] for layer in range(first.source_layers)]
        try:
            both = first.compose(second)
        except UserError:
            used = [{first.modifiers[layer] for layer in second.sources_of(g)} for g in range(len(second))]
            assert any(len(kinds) > 1 for kinds in used)
            return
        assert grow(model, both) == grow(grow(model, first), second)

    def test_noise_of_the_first_map_cannot_be_composed(self):
        noisy, dus = LayerMap.parse("identity+noise:0.1@0", 4), LayerMap.parse("dus:1", 4)
        with pytest.raises(UserError, match="convert twice"):
            noisy.compose(dus)
        assert dus.compose(LayerMap.parse("identity+noise:0.1@0", 6)).modifiers[0].noise == 0.1

    def test_solar_holds_its_base(self):
        """The 48-layer model cut back to the 32 layers it was made from."""
        back = LayerMap.parse("slices:0-24,40-48", 48)
        assert LayerMap.parse("dus:8", 32).compose(back).is_identity

    def test_remap_list_of_means(self):
        assert LayerMap.parse("mean:0-2", 3).remap_list("aab") == list("aaab")
        with pytest.raises(UserError, match="mean of layers"):
            LayerMap.parse("mean", 3).remap_list("aab")

    def test_a_mean_is_drawn(self):
        lines = LayerMap.parse("mean:0-2+freeze@0", 4).describe().splitlines()
        assert lines[0].startswith("5 layers from 4: 0 | 0~1 | 1..3")
        assert any("~~" in line and "0~1" in line for line in lines)
        assert lines[-1] == "target layers 0: frozen"


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
