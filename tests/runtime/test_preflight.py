"""preflight: what it finds among the ranks, and the whole of it on two."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest

from solar_mega.runtime.preflight import Rank, compare
from tests.distributed import run_ranks

GPU = Rank(0, "a", "torch 2.13", "NVIDIA H100 80GB HBM3", "uuid-0", 0.01)
NODE = [replace(GPU, rank=r, device_id=f"uuid-{r}") for r in range(4)]


def test_equal_ranks_are_fine():
    assert compare(NODE) == []
    assert compare([replace(GPU, rank=r, device="CPU", device_id="0") for r in range(2)]) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            dict(versions="torch 2.12", host="b"),
            "differ in versions: torch 2.13 on a (ranks 0, 1, 2)",
        ),
        (
            dict(device="CPU"),
            "differ in device: NVIDIA H100 80GB HBM3 on a (ranks 0, 1, 2); CPU on a",
        ),
        (dict(device_id="uuid-0"), "a: ranks 0, 3 share the GPU uuid-0"),
        (dict(used=0.4), "a, rank 3: 40% of the GPU's memory is already used"),
        (dict(lacks=("kernels.linear needs X",)), "a (ranks 3): kernels.linear needs X"),
        (dict(device="missing: local rank 3 of 3 visible GPUs"), "missing: local rank 3 of 3 visible GPUs"),
    ],
)
def test_what_differs_is_named(change, expected):
    found = compare([*NODE[:3], replace(NODE[3], **change)])
    assert len(found) == 1 and expected in found[0]


def check(*directories: str) -> int:
    """This rank's exit code; each rank its own directory."""
    from solar_mega.__main__ import main

    rank = int(os.environ["RANK"])
    return main(["preflight", "--dir", directories[rank % len(directories)], "--payload-mib", "1"])


def read_ahead(directory: str) -> list[int]:
    from solar_mega.__main__ import main

    words = ["preflight", "--dir", directory, "--payload-mib", "1", "--"]
    settings = """pretrain --model.path x --data.train x --output.dir x --train.steps 1
        --train.seq_length 32 --train.global_batch_size 2"""
    training = settings.split()
    return [
        main([*words, *training]),
        main([*words, *training, "--kernels.linear", "te"]),
        main([*words, *training, "--kernels.liner", "te"]),
        main([*words, "convert", "a", "b"]),
    ]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_the_training_to_come_is_looked_at(tmp_path: Path):
    assert run_ranks(read_ahead, 2, str(tmp_path)) == [[0, 2, 2, 0]] * 2


def test_ranks_that_share_a_directory(tmp_path: Path):
    assert run_ranks(check, 2, str(tmp_path / "new" / "logs")) == [0, 0]
    assert list((tmp_path / "new" / "logs").iterdir()) == []


def test_a_directory_that_is_not_shared(tmp_path: Path):
    assert run_ranks(check, 2, str(tmp_path / "a"), str(tmp_path / "b")) == [2, 2]


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert run_ranks(check, 2, str(tmp_path / "a"), str(tmp_path / "file" / "b")) == [2, 2]
