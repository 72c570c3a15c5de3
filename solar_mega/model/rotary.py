"""Rotary positions in Megatron's model: tables shared by all layers, positions handed down with the
tokens.
"""

import functools

import torch
from torch import Tensor, nn

from solar_mega.model.architecture import Rope


@functools.lru_cache(maxsize=8)
def rotary_tables(rope: Rope, head_dim: int, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · inverse frequency, each [positions, head_dim / 2] fp32.

    The angles are computed in fp64: at position 32768 an fp32 angle is already off by 1e-3.
    """
    frequencies = torch.tensor(rope.inverse_frequencies(head_dim), dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


class RotaryPositions(nn.Module):
    """Stands where Megatron's GPTModel computes its rotary embedding and returns positions instead of angles.

    Megatron counts positions from 0 in every sample and ignores `position_ids`; packed samples restart them.
    So the model's `position_ids` [b, s] are picked up as it is called, and go to every layer, through
    recomputation too, in the place of `rotary_pos_emb`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._positions: Tensor | None = None
        model.register_forward_pre_hook(self._pick_up, with_kwargs=True)

    def _pick_up(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[1] if len(args) > 1 else kwargs.get("position_ids")
        if ids is None:
            self._positions = None
        else:
            self._positions = ids[0] if ids.shape[0] == 1 else ids.t()

    def get_rotary_seq_len(self, *args) -> int:
        return 0

    def forward(self, *args, **kwargs) -> Tensor | None:
        """[s, b], or [s] where all samples share them; None for 0 ... s - 1."""
        positions, self._positions = self._positions, None
        return positions
