"""How pictures of this project look: one ink, one grid, one order of colours. matplotlib is imported when
something is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, GRID = "#22303c", "#dfe5ea"
OURS = "#d1495b"
OTHERS = ("#3d7ea6", "#edae49", "#7d8597", "#66a182", "#8d6a9f", "#2e4057", "#c98b6b")
"""Colours of everything beside what a picture is about."""


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (figure, axes) as `pyplot.subplots` does, and writes the picture to `path` after the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 10, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        drawn, axes = plt.subplots(rows, columns, **options)
        try:
            yield drawn, axes
            drawn.tight_layout()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=160)
        finally:
            plt.close(drawn)


def tidy(axis: Any, grid: str = "both") -> None:
    """Grid behind, no frame above and to the right."""
    axis.grid(axis=grid, color=GRID, linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
