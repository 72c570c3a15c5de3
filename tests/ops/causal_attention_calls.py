"""Forward and backward of the causal attention op of a library, over packed samples of awkward lengths: at,
before and after the ends of its blocks of queries and panels of keys. Run by test_on_host_sanitized.py.

    python causal_attention_calls.py LIBRARY
"""

import itertools
import sys

import torch

PACKED = ([1], [1, 1, 1], [63, 1], [64, 65, 3], [17, 47, 1, 66, 5], [129, 130], [513], [5, 600, 7])
SHAPES = ((1, 1, 1), (2, 3, 7), (1, 2, 33))  # groups, query heads per group, width of a head
DTYPES = (torch.float32, torch.bfloat16)
WINDOWS = (0, 65)


def main(library: str) -> None:
    torch.ops.load_library(library)
    torch.set_num_threads(2)
    random = torch.Generator().manual_seed(0)
    for lengths, shape, dtype, window in itertools.product(PACKED, SHAPES, DTYPES, WINDOWS):
        groups, per, d = shape
        s = sum(lengths)
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        # k and v as views between other values, as in a packed QKV; q in memory of its own.
        packed = torch.randn(s, 1, groups, (per + 2) * d, generator=random).to(dtype)
        k, v = packed[..., per * d : (per + 1) * d], packed[..., (per + 1) * d :]
        q = torch.randn(s, 1, groups * per, d, generator=random).to(dtype)
        for cu_seqlens in (starts, None):
            arguments = (d**-0.5, window, cu_seqlens)
            out, stats = torch.ops.solar_mega.causal_attention(q, k, v, *arguments)
            torch.ops.solar_mega.causal_attention_backward(out, q, k, v, stats, *arguments)


if __name__ == "__main__":
    main(sys.argv[1])
