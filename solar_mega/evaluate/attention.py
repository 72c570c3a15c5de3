"""Attention for scoring and generating: groups of sequences with a common prefix, and a cache of keys and
values.

`PlannedAttention` stands around a layer's core attention. Without a plan it is that attention; with one it
serves rows made by `packing.py`. Positions come with the tokens and the rotation is done before, so the
parameters and the rest of the layer know nothing of it.

Shapes:  s tokens in the row (batch 1), n query heads per rank, g key/value heads per rank, d head_dim,
         r sequences that are being generated, c slots of the cache (one per position).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solar_mega.evaluate.packing import GroupLayout


@dataclass
class KVCache:
    """Keys and values of r sequences, per layer [r, g, c, d]; slot = position."""

    capacity: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class RowPlan:
    """A row of groups. With a cache, the groups are prompts (no suffixes) and their keys are kept."""

    groups: list[GroupLayout]
    device: torch.device
    cache: KVCache | None = None
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, group: int, window: int | None) -> Tensor:
        """`suffix_mask` of a group, made once for all layers with that window."""
        if (group, window) not in self.masks:
            self.masks[group, window] = suffix_mask(self.groups[group], window).to(self.device)
        return self.masks[group, window]


@dataclass
class DecodePlan:
    """A row of r next tokens, one per sequence of the cache."""

    cache: KVCache
    positions: Tensor
    """[r] int64"""
    used: int
    """Slots up to the furthest position."""


Plan = RowPlan | DecodePlan


def suffix_mask(group: GroupLayout, window: int | None) -> Tensor:
    """bool [suffix tokens, prefix + suffix tokens]: what suffix tokens see, the prefix and their own suffix
    up to themselves; of these, with a `window`, only so many positions back, themselves included."""
    lengths = torch.tensor(group.suffixes)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    begin = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    place = torch.arange(len(owner))
    position = group.prefix + place - begin
    own = (owner[:, None] == owner) & (place[:, None] >= place)
    mask = torch.cat([torch.ones(len(owner), group.prefix, dtype=torch.bool), own], 1)
    if window is None:
        return mask
    seen = torch.cat([torch.arange(group.prefix), position])
    return mask & (position[:, None] - seen < window)


class PlannedAttention(nn.Module):
    """Core attention that follows `plan` while one is set."""

    def __init__(self, inner: nn.Module, layer: int, window: int | None, scale: float | None) -> None:
        super().__init__()
        self.inner, self.layer, self.window, self.scale = inner, layer, window, scale
        self.plan: Plan | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **options) -> Tensor:
        """query [s, 1, n, d], key and value [s, 1, g, d] -> [s, 1, n*d]."""
        if self.plan is None:
            return self.inner(query, key, value, *args, **options)
        if isinstance(self.plan, DecodePlan):
            return self._decode(query, key, value, self.plan)
        if self.plan.cache is not None:
            self._remember(key, value, self.plan)
        parts = []
        for number, group in enumerate(self.plan.groups):
            prefix = slice(group.start, group.start + group.prefix)
            whole = slice(group.start, group.start + group.size)
            if group.prefix:
                parts.append(self.inner(query[prefix], key[prefix], value[prefix], *args, **options))
            if group.suffixes:
                suffix = slice(prefix.stop, whole.stop)
                mask = self.plan.mask(number, self.window)
                parts.append(self._masked(query[suffix], key[whole], value[whole], mask))
        return torch.cat(parts)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query [t, 1, n, d] over key and value [s, 1, g, d] where mask [t, s] -> [t, 1, n*d]."""
        t, _, n, d = query.shape
        g = key.shape[2]
        # The queries of a key/value head become rows of it: nothing is repeated for grouped heads.
        rows = query.view(t, g, n // g, d).permute(1, 2, 0, 3).reshape(1, g, n // g * t, d)
        k, v = (x.permute(1, 2, 0, 3) for x in (key, value))
        out = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=mask.repeat(n // g, 1)[None, None], scale=self.scale
        )
        return out.view(g, n // g, t, d).permute(2, 0, 1, 3).reshape(t, 1, n * d)

    def _remember(self, key: Tensor, value: Tensor, plan: RowPlan) -> None:
        assert plan.cache is not None
        g, d = key.shape[2:]
        shape = (len(plan.groups), g, plan.cache.capacity, d)
        for kept, fresh in ((plan.cache.keys, key), (plan.cache.values, value)):
            store = kept[self.layer] = fresh.new_zeros(shape)
            for row, group in enumerate(plan.groups):
                prompt = fresh[group.start : group.start + group.prefix, 0]
                store[row, :, : group.prefix] = prompt.transpose(0, 1)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, plan: DecodePlan) -> Tensor:
        r, _, n, d = query.shape
        g = key.shape[2]
        keys, values = plan.cache.keys[self.layer], plan.cache.values[self.layer]
        sequences = torch.arange(r, device=query.device)
        keys[sequences, :, plan.positions] = key[:, 0]
        values[sequences, :, plan.positions] = value[:, 0]
        slots = torch.arange(plan.used, device=query.device)
        seen = slots <= plan.positions[:, None]
        if self.window is not None:
            seen &= plan.positions[:, None] - slots < self.window
        out = F.scaled_dot_product_attention(
            query.reshape(r, g, n // g, d),
            keys[:, :, : plan.used],
            values[:, :, : plan.used],
            attn_mask=seen[:, None, None],
            scale=self.scale,
        )
        return out.reshape(r, 1, n * d)
