"""LayerMap: the paper's equation, its properties for any depth, composition."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.depth.layer_map import MAX_LAYERS, LayerMap, Seam, depth_up_scaling
from solar_mega.depth.modifiers import IDENTITY_BLOCK, Modifier
from solar_mega.errors import UserError
from tests.depth.strategies import depth_and_m, depths, maps


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
