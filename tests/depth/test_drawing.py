"""Layer maps as they are printed."""

from hypothesis import given

from solar_mega.depth.layer_map import LayerMap
from tests.depth.strategies import maps


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
