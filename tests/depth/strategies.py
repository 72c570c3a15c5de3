"""Depths and layer maps for hypothesis to draw."""

from hypothesis import strategies as st

from solar_mega.depth.layer_map import LayerMap

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
