"""Parameters that may differ from tensor to tensor, as mergekit spells them: a number, a gradient over the
layers, or rules chosen by the tensor's name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from solar_mega.errors import UserError


@dataclass(frozen=True)
class Rule:
    """Values for the tensors whose name contains `filter`; None stands for all of them."""

    filter: str | None
    values: tuple[float, ...]
    """One number, or a gradient: the first for the first layer, the last for the last one, piecewise linear
    in between."""


@dataclass(frozen=True)
class Setting:
    """One parameter. The first rule that fits a tensor decides."""

    rules: tuple[Rule, ...]

    @classmethod
    def constant(cls, *values: float) -> "Setting":
        """A number, or several as a gradient."""
        return cls((Rule(None, tuple(values)),))

    def at(self, name: str, position: float) -> float | None:
        """The value for tensor `name` of the layer at `position` (0 first, 1 last; 0 outside the layers).
        None where no rule fits."""
        for rule in self.rules:
            if rule.filter is None or rule.filter in name:
                place = position * (len(rule.values) - 1)
                left = min(int(place), len(rule.values) - 1)
                right = min(left + 1, len(rule.values) - 1)
                share = place - left
                return (1 - share) * rule.values[left] + share * rule.values[right]
        return None


Settings = Mapping[str, Setting]


def read_setting(value: Any, key: str) -> Setting:
    """A setting as mergekit's YAML gives it: `0.5`, `[0, 0.5, 1]`, `{filter: mlp, value: 1}`, or a list of
    such rules. Raises UserError naming `key`."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return Setting(tuple(_rule(item, key) for item in value))
    return Setting((Rule(None, _numbers(value, key)),))


def _rule(entry: dict[str, Any], key: str) -> Rule:
    unknown = entry.keys() - {"filter", "value"}
    if unknown or "value" not in entry:
        raise UserError(f"{key}: a rule has `value` and, to choose tensors, `filter`; got {entry!r}")
    wanted = entry.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise UserError(f"{key}: filter must be a part of tensor names such as self_attn, got {wanted!r}")
    return Rule(None if wanted in (None, "*") else wanted, _numbers(entry["value"], key))


def _numbers(value: Any, key: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        numbers = tuple(float(item) for item in values)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise UserError(f"{key} = {value!r}: must be a number, a list of numbers, or rules {{filter, value}}")
    return numbers


def read_filters(texts: tuple[str, ...], key: str) -> tuple[Rule, ...]:
    """Rules written as `mlp=0.3` or `self_attn=0,0.5,1`. Raises UserError naming `key`."""
    rules = []
    for text in texts:
        wanted, equals, numbers = text.partition("=")
        if not equals or not wanted:
            raise UserError(f'{key} "{text}": write PART_OF_NAME=VALUE or PART_OF_NAME=FIRST,...,LAST')
        rules.append(Rule(wanted, _numbers(numbers.split(","), f"{key} {wanted}")))
    return tuple(rules)
