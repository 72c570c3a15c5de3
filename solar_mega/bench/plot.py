"""Bars of what each provider reached, under the roof that a plain copy sets."""

from pathlib import Path
from typing import Any

_INK, _GRID = "#22303c", "#dfe5ea"
_OURS = "#d1495b"
_OTHERS = ("#3d7ea6", "#7fb2cf", "#edae49", "#7d8597", "#66a182", "#8d6a9f", "#b5651d", "#2e4057")


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a `bench kernels` report: one group of bars per operation and direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in report["results"] if r.get("bytes_per_second") and r["operation"] != "dpo_loss"]
    groups = list(dict.fromkeys((r["operation"], r["mode"]) for r in timed))
    names = list(dict.fromkeys(r["provider"] for r in timed))
    colours = dict(zip((n for n in names if n != "solar_mega"), _OTHERS * 2, strict=False)) | {
        "solar_mega": _OURS
    }
    roof = report["copy_bytes_per_second"] / 1e9

    widest = max(sum((r["operation"], r["mode"]) == group for r in timed) for group in groups)
    width = 0.84 / widest

    figure, axis = plt.subplots(figsize=(max(7.0, 1.0 + 1.7 * len(groups)), 4.8))
    for at, group in enumerate(groups):
        bars = [r for r in timed if (r["operation"], r["mode"]) == group]
        for place, r in enumerate(bars):
            x = at + (place + 0.5 - len(bars) / 2) * width
            height = r["bytes_per_second"] / 1e9
            axis.bar(x, height, 0.92 * width, color=colours[r["provider"]], zorder=2)
            if r["provider"] == "solar_mega":
                axis.text(
                    x, height, f"{height / roof:.0%}", ha="center", va="bottom", fontsize=8, color=_OURS
                )
    axis.axhline(roof, color=_INK, linewidth=1.2, linestyle="--", zorder=3)
    axis.text(
        len(groups) - 0.45, roof, f"copy: {roof:.0f} GB/s ", ha="right", va="bottom", fontsize=9, color=_INK
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    axis.legend(handles, names, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_xticks(range(len(groups)), [f"{op}\n{mode}" for op, mode in groups], fontsize=9)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylim(0, 1.15 * max([roof, *(r["bytes_per_second"] / 1e9 for r in timed)]))
    axis.set_ylabel("GB/s, counting the bytes that must move")
    axis.set_title(
        f"{report['device']}, {report['shape']['tokens']} tokens, {report['shape']['dtype']}", fontsize=10
    )
    axis.grid(axis="y", color=_GRID, linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
