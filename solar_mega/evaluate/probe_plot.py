"""A probe as one picture: what each m costs, how rough each seam is, and what each layer does."""

from pathlib import Path
from typing import Any

_INK, _GRID = "#22303c", "#dfe5ea"
_DUS, _SEAM, _QUIET = "#d1495b", "#3d7ea6", "#7d8597"
_MARKS = ("s", "^", "D", "v", "P")
_RIVALS = ("#edae49", "#66a182", "#8d6a9f", "#2e4057", "#b5651d")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a report (`probe_report.as_json`); the suffix gives the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.edgecolor": _INK, "text.color": _INK})
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(5, 4, 4))
    _losses(axes[0], report)
    _seams(axes[1], report)
    _layers(axes[2], report)
    for axis in axes:
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in (axes[0], axes[2]):
        axis.spines["right"].set_visible(False)
    tokens = report["windows"] * report["seq_length"]
    figure.suptitle(
        f"{report['source']}: {len(report['layers'])} layers, probed on {tokens} tokens",
        fontsize=11,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _losses(axis: Any, report: dict[str, Any]) -> None:
    dus, n = report["dus"], len(report["layers"])
    axis.axhline(report["loss"], color=_INK, linewidth=1, linestyle="--", label=f"source, {n} layers")
    line = {"color": _DUS, "linewidth": 2, "label": "dus:m (the paper)", "zorder": 3}
    axis.plot([entry["layers"] for entry in dus], [entry["loss"] for entry in dus], "o-", **line)
    styles = zip(report["rivals"], _RIVALS * 3, _MARKS * 3, strict=False)
    for entry, colour, mark in styles:
        point = {"color": colour, "marker": mark, "markersize": 8, "linestyle": "", "zorder": 4}
        axis.plot([entry["layers"]], [entry["loss"]], label=entry["map"], **point)
    best = next((entry for entry in dus if entry["m"] == report["suggestion"]["m"]), None)
    for entry in dus[:: max(1, len(dus) // 10)]:
        place = (entry["layers"], entry["loss"])
        options = {"textcoords": "offset points", "color": _DUS, "fontsize": 8, "ha": "center"}
        axis.annotate(str(entry["m"]), place, xytext=(0, 9), **options)
    title = "What growing costs before any training"
    if best is not None:
        ring = {"markersize": 16, "markerfacecolor": "none", "markeredgecolor": _INK}
        axis.plot([best["layers"]], [best["loss"]], "o", zorder=2, **ring)
        title += f"\nringed: m = {best['m']}, {best['layers']} layers, {best['excess']:+.3f} nats"
    axis.set_xlabel("layers of the grown model (numbers at the line: m)")
    axis.set_ylabel("loss at step 0, nats per token")
    axis.set_title(title, fontsize=10)
    axis.spines["top"].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    axis.margins(y=0.12)


def _seams(axis: Any, report: dict[str, Any]) -> None:
    """Cosine to the left, linear; length to the right, logarithmic: early layers may be shorter by orders of
    magnitude."""
    with_seam = [entry for entry in report["dus"] if entry["seams"]]
    m = [entry["m"] for entry in with_seam]
    seams = [min(entry["seams"], key=lambda seam: seam["cosine"]) for entry in with_seam]
    cosines = [seam["cosine"] for seam in seams]
    (left,) = axis.plot(m, cosines, "o-", color=_SEAM, linewidth=2, label="direction: cosine (left)")
    axis.set_ylim(min(0.0, *cosines, 0.0) - 0.02, 1.05)
    right_axis = axis.twinx()
    ratios = [seam["norm_ratio"] for seam in seams]
    (right,) = right_axis.plot(m, ratios, "s--", color=_QUIET, label="length: ratio of norms (right)")
    right_axis.set_yscale("log")
    right_axis.spines["top"].set_visible(False)
    if max(ratios, default=1) < 10 and min(ratios, default=1) > 0.1:
        right_axis.set_ylim(0.1, 10)
    axis.set_xlabel("m: layers dropped from each copy")
    axis.set_title(
        "What arrives at the seam, beside what layer m\nsaw in the source (1 and 1: the same)", fontsize=10
    )
    axis.spines["top"].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(handles=[left, right], frameon=False, fontsize=9, loc="center right")


def _layers(axis: Any, report: dict[str, Any]) -> None:
    numbers = [layer["layer"] for layer in report["layers"]]
    colours = [_SEAM] * len(numbers)
    axis.bar(numbers, [1 - layer["cosine"] for layer in report["layers"]], color=colours, width=0.8)
    axis.set_xlabel("layer of the source")
    axis.set_ylabel("1 - cosine(input, output), logarithmic")
    axis.set_yscale("log")
    axis.set_title("How much each layer turns its input", fontsize=10)
    axis.spines["top"].set_visible(False)
    axis.set_xticks(numbers[:: max(1, len(numbers) // 8)])
