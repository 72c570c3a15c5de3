"""The process that writes a save beside the training."""

import os

import torch
from torch.distributed.checkpoint.planner_helpers import _create_write_items

from solar_mega.checkpoint.writing import Written, read_report, write_beside

FORKS = 20
"""Of those, a quarter failed while both threads of the writer could look for torch's thread pool at once."""


def _write_again_and_again(root):
    """Two files at a time from forks of a process that computes with several threads; what went wrong.

    The tensors are views, which are copied before they are written, and long enough for torch to want
    threads for it.
    """
    torch.set_num_threads(2)
    whole = torch.rand(2, 1 << 20)
    (whole + 1).sum()
    failures = []
    for number in range(FORKS):
        buckets = []
        for part, tensor in enumerate(whole):
            name = f"{number}_{part}.distcp"
            item = _create_write_items(f"part{part}", tensor)[0]
            buckets.append((str(root / name), name, ([], [(item, tensor)])))
        report, trainer = root / f"report{number}", os.getpid()
        writer = os.fork()
        if writer == 0:
            try:
                write_beside(0, buckets, str(report), trainer, True)
            finally:
                os._exit(0)
        os.waitpid(writer, 0)
        outcome = read_report(report)
        if not isinstance(outcome, Written):
            failures.append(repr(outcome))
        for path, *_ in buckets:
            os.unlink(path)
    return failures


def test_writers_of_large_views_find_their_threads(tmp_path):
    from tests.distributed import run_ranks

    assert run_ranks(_write_again_and_again, 1, tmp_path) == [[]]
