"""loss.png: the base level, the jump at growth, the recovery, the controls; over tokens and over FLOPs."""

from pathlib import Path

from solar_mega.quickstart.runs import Curve, Runs
from solar_mega.runtime.drawing import INK, figure, tidy

_STYLE = {
    # run: (label, colour, width, dashes)
    "grown": ("12 layers, dus:2 (the paper)", "#d1495b", 2.4, None),
    "stack": ("16 layers, stack:2 (plain doubling)", "#edae49", 1.6, None),
    "continued": ("8 layers, the base simply trained on", "#3d7ea6", 1.6, None),
    "scratch": ("12 layers from scratch", "#7d8597", 1.4, (4, 2)),
}


def plot(runs: Runs, path: Path) -> None:
    """Writes the picture. The left panel's axis goes on from the base's last token; the right one counts only
    what was spent after growth, where deeper models pay more per token."""
    shape = {"figsize": (11.5, 4.8), "sharey": True, "width_ratios": (3, 2)}
    with figure(path, 1, 2, **shape) as (_, (left, right)):
        _draw(runs, left, right)


def _draw(runs: Runs, left, right) -> None:
    grown_at = runs.base.tokens[-1]
    for name, (label, colour, width, dashes) in _STYLE.items():
        curve: Curve = getattr(runs, name)
        style = {"color": colour, "linewidth": width, "label": label, "zorder": 3 if name == "grown" else 2}
        if dashes:
            style["dashes"] = dashes
        left.plot([(grown_at + t) / 1e6 for t in curve.tokens], curve.val_loss, **style)
        right.plot([f / 1e12 for f in curve.flops], curve.val_loss, **style)
    left.plot(
        [t / 1e6 for t in runs.base.tokens],
        runs.base.val_loss,
        color=INK,
        linewidth=1.6,
        label="8-layer base",
    )
    low, high = _limits(runs)
    for axis in (left, right):
        axis.axhline(runs.base.end, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        tidy(axis)
        axis.set_ylim(low, high)
    _annotate_left(left, runs, grown_at, high)
    left.set_xlabel("tokens seen, million")
    left.set_ylabel("validation loss, nats per token")
    right.set_xlabel("training compute after growth, TFLOP")
    right.set_title("the same, over compute", fontsize=10)
    left.set_title("grown by depth, then trained on", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="upper right")
    _inset_whole_story(right, runs)


def _limits(runs: Runs) -> tuple[float, float]:
    """From just below the best end to well above the jumps; the run from scratch enters from above."""
    shown = [*runs.grown.val_loss, *runs.stack.val_loss, *runs.continued.val_loss]
    low, high = min(shown), max(shown)
    span = max(high - low, 0.05)
    return low - 0.12 * span, high + 1.3 * span


def _annotate_left(axis, runs: Runs, grown_at: int, high: float) -> None:
    after = runs.grown.tokens[-1]
    axis.set_xlim((grown_at - 0.35 * after) / 1e6, (grown_at + 1.03 * after) / 1e6)
    axis.axvline(grown_at / 1e6, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    axis.annotate(
        f"base level {runs.base.end:.3f}",
        ((grown_at - 0.34 * after) / 1e6, runs.base.end),
        xytext=(0, -12),
        textcoords="offset points",
        fontsize=9,
    )
    axis.annotate(
        f"growth:\n{runs.base.end:.3f} → {runs.grown.start:.3f}",
        (grown_at / 1e6, runs.grown.start),
        xytext=(-24, 30),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": _STYLE["grown"][1], "linewidth": 1.2},
        color=_STYLE["grown"][1],
    )
    recovered = runs.grown.tokens_to_reach(runs.base.end)
    if recovered:
        axis.annotate(
            f"base level again after {recovered / 1e3:.0f}K tokens",
            ((grown_at + recovered) / 1e6, runs.base.end),
            xytext=(26, 30),
            textcoords="offset points",
            fontsize=9,
            arrowprops={"arrowstyle": "->", "color": _STYLE["grown"][1], "linewidth": 1.2},
            color=_STYLE["grown"][1],
        )


def _inset_whole_story(axis, runs: Runs) -> None:
    """Small picture of everything from the first token: there the run from scratch is in sight."""
    inset = axis.inset_axes((0.46, 0.56, 0.52, 0.38))
    grown_at = runs.base.tokens[-1]
    inset.plot([t / 1e6 for t in runs.base.tokens], runs.base.val_loss, color=INK, linewidth=1.2)
    for name, (_, colour, _, dashes) in _STYLE.items():
        curve: Curve = getattr(runs, name)
        style = {"dashes": dashes} if dashes else {}
        inset.plot(
            [(grown_at + t) / 1e6 for t in curve.tokens], curve.val_loss, color=colour, linewidth=1.2, **style
        )
    inset.set_title("from the first token (million)", fontsize=8)
    inset.tick_params(labelsize=7)
    inset.spines[["top", "right"]].set_visible(False)
