"""What a probe tells: the suggested m and how it was found, JSON, and a table for the terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from solar_mega.evaluate.probe import MapFacts, Probe
from solar_mega.runtime.console import table

RULE = (
    "Going from plain doubling (the smallest m scanned) to m = n/2 (the source itself), added layers and "
    "excess loss both fall from all to nothing. Suggested is the m whose share of the added layers exceeds "
    "its share of the excess loss by most: the point farthest below the straight line between the two ends."
)
LIMITS = (
    "This is the loss before any training. The paper trains after growing, says that performance recovers "
    "quickly, and leaves the best m open (its limitations); a smaller excess at the start promises a cheaper "
    "recovery, not a better model in the end. The text matters too: probe on what you will train on."
)


@dataclass(frozen=True)
class Suggestion:
    m: int | None
    """None where no m stands out."""

    reason: str

    scores: dict[int, float]
    """Share of the added layers kept minus share of the excess loss, by m."""


def suggest(n: int, base_loss: float, dus: Sequence[tuple[int, float]]) -> Suggestion:
    """The m with the best trade between depth and damage (`RULE`).

    Args:
        n: layers of the source.
        base_loss: of the source; also that of m = n/2, which gives the source back.
        dus: (m, loss at step 0) of every m scanned.
    """
    deeper = sorted((m, loss) for m, loss in dus if 2 * m < n)
    if len(deeper) < 2:
        return Suggestion(None, f"needs at least two m below n/2 = {n / 2:g}", {})
    first, worst = deeper[0][0], deeper[0][1] - base_loss
    if worst <= 0:
        return Suggestion(None, f"m = {first} costs nothing on this text, so there is nothing to trade", {})
    most = n - 2 * first
    scores = {m: (n - 2 * m) / most - (loss - base_loss) / worst for m, loss in deeper}
    best = max(scores, key=lambda m: (scores[m], -m))
    if scores[best] <= 0:
        return Suggestion(
            None, "the excess loss falls no faster than the depth: every m is as good a trade", scores
        )
    kept, paid = (n - 2 * best) / most, (dict(deeper)[best] - base_loss) / worst
    reason = (
        f"dus:{best} keeps {kept:.0%} of the layers that m = {first} adds ({n - 2 * best} of {most}) for "
        f"{paid:.0%} of its excess loss"
    )
    return Suggestion(best, reason, scores)


def as_json(
    found: Probe, dus: Sequence[int], suggestion: Suggestion, about: dict[str, Any]
) -> dict[str, Any]:
    """The report. `dus` are the m of the first maps probed; the maps after them are the rivals."""
    maps = [_map(facts, found.loss) for facts in found.maps]
    return {
        **about,
        "loss": found.loss,
        "layers": [asdict(layer) for layer in found.layers],
        "dus": [{"m": m, **entry} for m, entry in zip(dus, maps, strict=False)],
        "rivals": maps[len(dus) :],
        "suggestion": {
            "m": suggestion.m,
            "reason": suggestion.reason,
            "scores": {str(m): score for m, score in suggestion.scores.items()},
            "rule": RULE,
            "limits": LIMITS,
        },
        "layers_applied": found.applied,
        "layers_fetched": found.fetched,
    }


def _map(facts: MapFacts, base_loss: float) -> dict[str, Any]:
    return {
        "map": facts.spelling,
        "layers": facts.layers,
        "loss": facts.loss,
        "excess": facts.loss - base_loss,
        "seams": [asdict(seam) for seam in facts.seams],
    }


def as_text(report: dict[str, Any]) -> str:
    """Tables and the suggestion."""
    suggested = report["suggestion"]["m"]
    rows = [("source", len(report["layers"]), f"{report['loss']:.4f}", "", "", "", "")]
    for entry in (*report["dus"], *report["rivals"]):
        mark = "  <-" if entry.get("m") is not None and entry["m"] == suggested else ""
        rows.append(
            (
                entry["map"] + mark,
                entry["layers"],
                f"{entry['loss']:.4f}",
                f"{entry['excess']:+.4f}",
                *_seam(entry["seams"]),
            )
        )
    headers = ("map", "layers", "loss at step 0", "excess", "seams", "cosine", "norm ratio")
    layers = [
        (layer["layer"], f"{layer['cosine']:.4f}", f"{layer['update']:.3f}", f"{layer['norm']:.3g}")
        for layer in report["layers"]
    ]
    advice = report["suggestion"]
    head = f"suggested: m = {suggested}" if suggested is not None else "no m stands out"
    return "\n".join(
        [
            table(rows, headers),
            "",
            table(layers, ("layer", "cosine(input, output)", "|update|/|input|", "|input|")),
            "",
            f"{head}: {advice['reason']}",
            advice["limits"],
        ]
    )


def _seam(seams: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """The most different seam stands for all."""
    if not seams:
        return "0", "", ""
    worst = min(seams, key=lambda seam: seam["cosine"])
    return str(len(seams)), f"{worst['cosine']:.4f}", f"{worst['norm_ratio']:.3f}"
