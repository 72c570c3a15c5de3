"""What a layer map says of single copies: scales, noise, frozen layers, blends."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solar_mega.depth.layer_map import MAX_LAYERS, LayerMap
from solar_mega.depth.modifiers import Modifier
from solar_mega.errors import UserError
from tests.depth.strategies import depths, maps


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
