"""What `linear_token_logprob` multiplies at a time: which tokens, how many columns, in which dtype."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from solar_mega.ops.products import products_in_fp32
from solar_mega.ops.token_logprob import Terms, gathered, shards
from solar_mega.ops.token_logprob_reference import counted_tokens

BLOCK_BYTES = 4 * 2**20
"""Of a matrix that is widened, multiplied or rounded block by block: large for a product, small beside any
result."""


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


def blocks_of(matrix: Tensor, wide: torch.dtype) -> list[slice]:
    """Its rows in blocks that take about `BLOCK_BYTES` in the dtype `wide`."""
    return pieces_of(matrix.shape[0], max(1, matrix.shape[1] * wide.itemsize), BLOCK_BYTES, 1)


class Scratch:
    """Memory for what is made for each piece, in the dtype of the products; allocated once per name, as the
    first piece is no smaller than the others. Fresh memory for each would cost page faults on the CPU, and
    the C library's heap does not always fit one aligned block where the last one was."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.memory = dtype, device, {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self.memory:
            self.memory[name] = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
        return self.memory[name][: rows * columns].view(rows, columns)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out=self.take(name, a.shape[0], b.shape[1]))

    def widened(self, name: str, x: Tensor) -> Tensor:
        """x in the dtype of the products."""
        return x if x.dtype == self.dtype else self.take(name, *x.shape).copy_(x)


def multiply(total: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """total = a · b, or total += a · b; total may be wider than a and b."""
    if total.dtype == a.dtype and add:
        total.addmm_(a, b)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total)
    elif total.is_cuda and add:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:  # PyTorch's CPU products come rounded to the dtype of their factors
        for rows in pieces_of(a.shape[0], max(1, b.shape[1] * b.element_size()), BLOCK_BYTES, 64):
            part = torch.mm(a[rows], b)
            total[rows] = total[rows].add_(part) if add else part


class WideSum:
    """A sum of products, [rows, columns], added up in a wider dtype than that of the result.

    An fp32 sum and its 16-bit result take no more memory than the sum: the first half of the rows is added up
    where the result will be, which rounding then compresses towards its start, block by block.

        memory of the result   | s0  s0 | s1  s1 |   ->   | r0 | r1 | r2 | r3 |
        memory of its own      | s2  s2 | s3  s3 |
    """

    def __init__(self, like: Tensor, wide: torch.dtype) -> None:
        """like: a matrix of the shape, dtype and device of the result."""
        rows, columns = like.shape
        self.result = torch.empty_like(like, memory_format=torch.contiguous_format)
        inside = rows * like.element_size() // wide.itemsize
        start = self.result.view(-1)[: inside * columns * wide.itemsize // like.element_size()]
        self.first = start.view(wide).view(inside, columns)
        self.rest = torch.empty(rows - inside, columns, dtype=wide, device=like.device)

    def multiply(self, rows: slice, a: Tensor, b: Tensor, *, add: bool) -> None:
        """These rows (+)= a · b."""
        inside = self.first.shape[0]
        for sums, origin in ((self.first, 0), (self.rest, inside)):
            start, stop = max(rows.start, origin), min(rows.stop, origin + sums.shape[0])
            if start < stop:
                part = a[start - rows.start : stop - rows.start]
                multiply(sums[start - origin : stop - origin], part, b, add=add)

    def rounded(self, factor: Tensor | None = None) -> Tensor:
        """The sum, times `factor`, in the dtype of the result. Ends the sum."""
        if self.first.dtype == self.result.dtype:
            return self.result if factor is None else self.result.mul_(factor)
        for sums, origin in ((self.first, 0), (self.rest, self.first.shape[0])):
            for rows in blocks_of(sums, sums.dtype):
                # A copy, since the result of a block may lie over the block itself.
                block = sums[rows].clone() if factor is None else sums[rows] * factor
                self.result[origin + rows.start : origin + rows.stop] = block
        return self.result


def gather_sequence(hidden: Tensor, head: Head) -> Tensor:
    """This rank's part of the sequence -> all of it, flattened to [T, h]."""
    if head.sequence_parallel and shards(head.group)[0] > 1:
        hidden = gathered(hidden.contiguous(), head.group).flatten(0, 1)
    return hidden.reshape(-1, hidden.shape[-1])


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
