"""What ends a run that cannot go on, and what it leaves behind: hangs, lost ranks, lack of memory."""

import contextlib
import io
import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch

from solar_mega.config.schema import CheckpointConfig, TrainConfig
from solar_mega.errors import ExitCode, LostRank, NotFinite, OutOfMemory
from solar_mega.runtime.watchdog import Watchdog
from solar_mega.train.guards import FiniteGuard, SpikeGuard, memory_guard
from solar_mega.train.step import NEXT_TOKEN, Objective, next_token_loss
from tests.distributed import run_ranks
from tests.train.tiny import BATCH, SEQUENCE, Case, batches, one_rank, start

CONFIG = TrainConfig(steps=9, seq_length=SEQUENCE, global_batch_size=BATCH, eval_samples=0)


def poisoned(data, number):
    """The data, with a loss of nan in micro-batch `number`."""
    for position, batch in enumerate(data):
        yield {**batch, "factor": math.nan} if position == number else batch


def with_factor(chunk, batch):
    return next_token_loss(chunk, batch) * batch.get("factor", 1.0)


def test_left_out_steps_are_counted_and_dumped(tmp_path, capsys):
    """The bad micro-batch is named with its samples; the run goes on once, and stops the second time."""
    case = Case(micro_batch_size=2)
    config = replace(CONFIG, skip_nonfinite=1)
    guard = FiniteGuard(config, tmp_path, lambda sample: {"sample": sample, "corpus": "here"})
    with one_rank():
        _, trainer = start(case)
        trainer.objective = Objective(with_factor)
        data, micro_batches = batches(case)
        stream = poisoned(data, 2)
        result = trainer.step(stream, micro_batches)
        guard.check(1, result, trainer)
        guard.check(2, trainer.step(stream, micro_batches), trainer)
        bad = trainer.step(poisoned(batches(case)[0], 0), micro_batches)
        with pytest.raises(NotFinite) as caught:
            guard.check(3, bad, trainer)
    assert caught.value.exit_code == ExitCode.NOT_FINITE == 3
    assert "Left out: 1 of train.skip_nonfinite = 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "nonfinite-step-00000001.json").read_text())
    assert report["samples"] == [0, BATCH - 1]
    (part,) = report["micro_batches_not_finite"]
    assert part["samples"] == [4, 5] and part["loss_sum"] == "nan" and part["rank"] == 0
    assert [place["sample"] for place in report["where"]] == [4, 5]
    assert report["gradients_not_finite"]["0"]
    assert (tmp_path / "nonfinite-step-00000003.json").is_file()


def test_a_jump_of_the_loss_is_named(capsys):
    guard = SpikeGuard(replace(CONFIG, spike_deviations=8.0), lambda sample: f"sample {sample}")
    generator = torch.Generator().manual_seed(0)
    noise = (4.0 + 0.05 * torch.randn(200, generator=generator)).tolist()
    assert not any(guard.check(step, loss) for step, loss in enumerate(noise, 1))
    assert guard.check(201, 6.0) > 20
    said = capsys.readouterr().out
    assert f"samples {200 * BATCH} to {201 * BATCH - 1}" in said and "loss 6.0000" in said
    assert guard.check(202, 6.0) > 20  # the first does not hide the second
    assert guard.check(203, 1.0) is None  # falling is fine


def test_spikes_can_be_turned_off():
    guard = SpikeGuard(replace(CONFIG, spike_deviations=0.0), None)
    assert not any(guard.check(step, 10.0**step) for step in range(1, 40))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 TB")]
)
def test_out_of_memory_says_what_to_change(tmp_path, error):
    words = "rank 0 is out of memory.*\n.*micro_batch_size"
    with pytest.raises(OutOfMemory, match=words) as caught, memory_guard(tmp_path):
        raise error
    assert caught.value.exit_code == 4


def test_a_real_allocation_too_large(tmp_path):
    with pytest.raises(OutOfMemory), memory_guard(tmp_path):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), memory_guard(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_watchdog_that_is_fed_stays_quiet(tmp_path):
    with Watchdog(0.4, tmp_path) as dog:
        for _ in range(8):
            dog.beat("work")
            time.sleep(0.1)
        for item in dog.along(range(8), "more"):
            time.sleep(0.1)
            assert item < 8
    time.sleep(0.6)  # and afterwards


def _hang(directory):
    """Rank 1 stops in the middle of a step; rank 0 waits for it in a collective."""
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.runtime import parallel

    with parallel.running(ParallelConfig(), threads=1), Watchdog(2.0, directory) as dog:
        dog.beat("step 7")
        if os.environ["RANK"] == "1":
            _stuck()
        torch.distributed.barrier()


def _stuck():
    time.sleep(120)


def test_a_hang_ends_with_everybodys_stacks(tmp_path):
    began = time.monotonic()
    done = run_ranks(_hang, 2, tmp_path, check=False, timeout=100)
    assert done.returncode and time.monotonic() - began < 60
    stacks = [(tmp_path / f"rank-000{rank}.txt").read_text() for rank in range(2)]
    assert "_stuck" in stacks[1] and "barrier" in stacks[0]
    for text in stacks:
        assert "no progress for 2 s; doing: step 7" in text
    for rank in range(2):
        assert f"rank {rank}: no progress for 2 s" in done.output
    assert f"exitcode  : {int(ExitCode.HUNG)}" in done.output


def _one_dies(how):
    """Rank 1 ends in the middle of training; what rank 0 makes of it."""
    from solar_mega.__main__ import report
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.runtime import parallel

    try:
        with parallel.running(ParallelConfig(), threads=1):
            torch.distributed.barrier()
            if os.environ["RANK"] == "1":
                if how == "killed":
                    os.kill(os.getpid(), 9)
                raise ValueError("the fault of rank 1")
            torch.distributed.barrier()
    except LostRank as error:
        report(error)
        os._exit(error.exit_code)


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_the_rank_that_failed_has_the_word(how):
    done = run_ranks(_one_dies, 2, how, check=False, timeout=100)
    assert done.returncode
    text = done.output
    if how == "raised":
        assert "ValueError: the fault of rank 1" in text
        assert "another rank ended" not in text[: text.index("ValueError: the fault")]
    else:
        assert "Signal 9 (SIGKILL)" in text
    assert done.of_the_ranks.count("Traceback (most recent call last)") == (1 if how == "raised" else 0)


def _stragglers():
    """Rank 1 sleeps in its forward pass."""
    from solar_mega.config.schema import ParallelConfig
    from solar_mega.runtime import parallel
    from solar_mega.train.guards import Stopwatch, Stragglers

    with parallel.running(ParallelConfig(), threads=1):
        case = Case(micro_batch_size=2)
        _, trainer = start(case)

        def slow(chunk, batch):
            if os.environ["RANK"] == "1":
                time.sleep(0.2)
            return next_token_loss(chunk, batch)

        trainer.objective = replace(NEXT_TOKEN, forward=slow)
        trainer.stopwatch = Stopwatch()
        data, micro_batches = batches(case)
        trainer.step(data, micro_batches)
        guard = Stragglers(replace(CONFIG, straggler_interval=5))
        assert guard.due(5) and not guard.due(6)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            columns = guard.report(5, trainer.stopwatch.seconds())
        return columns, said.getvalue()


def test_the_slowest_rank_is_named():
    (columns, said), (same, _) = run_ranks(_stragglers, 2)
    assert columns == same and columns["slowest_rank"] == 1 and columns["slowest_over_median"] > 1.2
    assert "step 5: rank 1 (" in said


def test_checkpoint_clock():
    from solar_mega.train.loop import _Clock

    with one_rank():
        assert not _Clock(0.0).due()
        clock = _Clock(1e-4)
        time.sleep(0.02)
        assert clock.due()
        clock.restart()
        assert not clock.due()
        assert not CheckpointConfig().interval_minutes
