"""Which verb a configuration file is for: the one that knows all its keys."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solar_mega.config.fields import MISSING, fields_of
from solar_mega.config.load import read_toml
from solar_mega.errors import UserError

KINDS = {
    "convert": "solar_mega.checkpoint.command:ConvertOptions",
    "pretrain": "solar_mega.config.schema:PretrainConfig",
    "sft": "solar_mega.config.sft:SFTConfig",
    "dpo": "solar_mega.config.dpo:DPOConfig",
    "merge": "solar_mega.merge.recipe:MergeConfig",
    "contamination": "solar_mega.evaluate.contamination_command:ContaminationOptions",
    "evaluate": "solar_mega.evaluate.command:EvaluateOptions",
}
"""Verb with `--config` -> the dataclass its file is read into, as `module:class`."""

TRAININGS = ("pretrain", "sft", "dpo")


def config_class(verb: str) -> type:
    module, name = KINDS[verb].split(":")
    return getattr(importlib.import_module(module), name)


def kind_of(path: Path) -> str:
    """The verb whose configuration has the fewest unknown and missing keys in this file.

    Raises UserError when the file cannot be read, or no verb knows half of its keys.
    """
    keys = set(_keys(read_toml(path)))
    scores = {}
    for verb in KINDS:
        fields = fields_of(config_class(verb))
        required = {key for key, field in fields.items() if field.default is MISSING}
        scores[verb] = (len(keys - fields.keys()), len(required - keys))
    best = min(scores, key=scores.__getitem__)
    if 2 * scores[best][0] >= max(1, len(keys)):
        raise UserError(f"--config {path}: not a configuration of {', '.join(KINDS)}; most keys are unknown")
    return best


def _keys(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in table.items():
        found += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found
