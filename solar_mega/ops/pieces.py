"""What `linear_token_logprob` multiplies at a time: which tokens, how many columns, in which dtype."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from solar_mega.ops.products import products_in_fp32
from solar_mega.ops.token_logprob import Terms, counted_tokens, gathered, shards


class Head(NamedTuple):
    """What every piece needs besides its numbers."""

    terms: Terms
    group: Any
    sequence_parallel: bool
    limit: int
    """Bytes of logits held at a time."""
    kernels: Any
    dtype: torch.dtype
    """Of the logits and of the factors of every product."""


def product_dtype(hidden: Tensor) -> torch.dtype:
    widened = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and products_in_fp32()
    return torch.float32 if widened else hidden.dtype


def pieces_of(count: int, bytes_each: int, limit: int, multiple: int) -> list[slice]:
    """`count` rows or columns in about equal pieces of at most `limit` bytes, cut at multiples."""
    most = max(limit // bytes_each // multiple * multiple, multiple)
    number = max(1, math.ceil(count / most))
    each = max(1, math.ceil(count / number / multiple)) * multiple
    return [slice(start, min(start + each, count)) for start in range(0, count, each)]


class Scratch:
    """Memory for what is made for each piece, allocated once per name, as the first piece is no smaller than
    the others. Fresh memory for each would cost page faults on the CPU, and the C library's heap does not
    always fit one aligned block where the last one was."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.memory = like, {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self.memory:
            self.memory[name] = self.like.new_empty(rows * columns)
        return self.memory[name][: rows * columns].view(rows, columns)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out=self.take(name, a.shape[0], b.shape[1]))

    def widened(self, name: str, x: Tensor) -> Tensor:
        """x in the dtype of the products."""
        return x if x.dtype == self.like.dtype else self.take(name, *x.shape).copy_(x)


def add_product(total: Tensor, a: Tensor, b: Tensor, limit: int) -> None:
    """total += a · b, total fp32 (or fp64)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # PyTorch's CPU products come rounded to the dtype of their factors
        for rows in pieces_of(a.shape[0], b.shape[1] * b.element_size(), limit, 64):
            total[rows].add_(a[rows] @ b)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != a.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def gather_sequence(hidden: Tensor, head: Head) -> Tensor:
    """This rank's part of the sequence -> all of it, flattened to [T, h], in the dtype of the products."""
    if head.sequence_parallel and shards(head.group)[0] > 1:
        hidden = gathered(hidden.contiguous(), head.group).flatten(0, 1)
    return hidden.reshape(-1, hidden.shape[-1]).to(head.dtype)


def sum_shards(dhidden: Tensor, like: Tensor, head: Head) -> Tensor:
    """dhidden [T, h] of this rank's columns -> of all columns, in the shape of this rank's hidden."""
    dhidden = dhidden.to(like.dtype)
    if shards(head.group)[0] == 1:
        return dhidden.view(like.shape)
    if not head.sequence_parallel:
        dist.all_reduce(dhidden, group=head.group)
        return dhidden.view(like.shape)
    mine = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.reduce_scatter_tensor(mine.view(-1, like.shape[-1]), dhidden, group=head.group)
    return mine


class Counted(NamedTuple):
    """The tokens that are multiplied at all: their numbers in the batch, or None where all of them are."""

    rows: Tensor | None
    tokens: int

    @classmethod
    def of(cls, targets: Tensor, mask: Tensor | None) -> "Counted":
        everything = cls(None, targets.numel())
        if targets.device.type != "cpu":
            return everything  # looking would make the host wait
        rows = counted_tokens(targets, mask).nonzero().squeeze(1)
        # Few to leave out are not worth a copy of hidden; and products want at least one row.
        return cls(rows, targets.numel()) if 0 < rows.numel() <= targets.numel() * 15 // 16 else everything

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def put(self, x: Tensor) -> Tensor:
        """What `take` took, among zeros."""
        if self.rows is None:
            return x
        return x.new_zeros(self.tokens, *x.shape[1:]).index_copy_(0, self.rows, x)

    def cut(self, position: int) -> int:
        """How many taken tokens stand before `position`."""
        return position if self.rows is None else int(torch.searchsorted(self.rows, position))
