"""Samples packed into one row: what attention is told about where they begin and end."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Packing(PackedSeqParams):
    """Megatron's parameters of packed samples ("thd" layout), with the offsets on the host too, where they
    decide how many kernels are launched: reading them from a GPU would make every layer wait."""

    bounds: tuple[int, ...] = ()

    def samples(self, query: Tensor) -> list[slice]:
        """The samples' places along s of query [s, 1, n, d], in order."""
        self.check(query)
        return [slice(begin, end) for begin, end in pairwise(self.bounds) if begin < end]

    def check(self, query: Tensor) -> None:
        """Raises ValueError unless the samples cover the one row of query [s, b, n, d]."""
        s, b = query.shape[:2]
        if b != 1 or self.bounds[0] != 0 or self.bounds[-1] != s:
            raise ValueError(
                f"packed samples lie in one row (b = 1) from 0 to its length; got b = {b}, s = {s} and "
                f"samples from {self.bounds[0]} to {self.bounds[-1]}"
            )


def packing(cu_seqlens: Tensor, device: torch.device) -> Packing:
    """cu_seqlens [samples + 1] int32 on the host, from 0 to the row's length, padding being the last sample.

    Raises ValueError for offsets of another kind.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}, on {cu_seqlens.device}; "
            "allowed: [samples + 1], int32, on the host"
        )
    bounds = tuple(cu_seqlens.tolist())
    longest = max(end - begin for begin, end in pairwise(bounds))
    there = cu_seqlens.to(device, non_blocking=True)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=there,
        cu_seqlens_kv=there,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )
