"""LayerMap: the paper's equation, its properties for any depth, spellings, drawings and refusals."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.depth.layer_map import MAX_LAYERS, LayerMap, Seam, depth_up_scaling
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
