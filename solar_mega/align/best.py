"""The model of the lowest validation loss so far, kept beside the last one."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solar_mega.config.sft import SFTConfig
from solar_mega.runtime import parallel as ranks
from solar_mega.runtime.console import say
from solar_mega.train.stage import Prepared

if TYPE_CHECKING:
    from torch.nn import Module

    from solar_mega.train.step import Evaluation


class BestExport:
    """Called after every validation: writes `<output.dir>/best` whenever the loss is the lowest so far. The
    weights that a run begins with are no result and not written. Collective.

    After a resume it goes on from the loss in that directory's lineage.
    """

    def __init__(
        self, cfg: SFTConfig, prepared: Prepared, chunks: "Sequence[Module]", side_files: Path
    ) -> None:
        self.cfg, self.prepared, self.chunks, self.side_files = cfg, prepared, chunks, side_files
        self.place = cfg.output.dir / "best"
        self.lowest = ranks.gather(_recorded_loss(self.place))[0]

    def __call__(self, step: int, seen: "Evaluation") -> None:
        if step == 0 or not seen.loss < self.lowest:
            return
        from solar_mega.checkpoint.to_hf import export_hf
        from solar_mega.model.builder import DTYPES

        self.lowest = seen.loss
        cfg, prepared = self.cfg, self.prepared
        lineage: dict[str, Any] = {
            "stage": "sft",
            "parent": str(prepared.source.path.resolve()),
            "layer_map": prepared.layer_map.to_json(),
            "steps": step,
            "val_loss": seen.loss,
        }
        export_hf(
            self.chunks,
            prepared.arch,
            cfg.parallel,
            self.place,
            side_files=self.side_files,
            dtype=DTYPES[cfg.output.export_precision or prepared.source.precision],
            shard_size=cfg.output.shard_size,
            lineage=lineage,
        )
        say(f"best      validation loss {seen.loss:.4f} at step {step}: {self.place}")


def _recorded_loss(place: Path) -> float:
    try:
        text = (place / "lineage.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return math.inf
    return _find(json.loads(text), "val_loss") or math.inf


def _find(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return (
            value[key] if key in value else next(filter(None, (_find(v, key) for v in value.values())), None)
        )
    return None
