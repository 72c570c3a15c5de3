"""A loss or gradient that is not finite: no update, a message that names step and samples."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from solar_mega.config.schema import CheckpointConfig, TrainConfig
from solar_mega.errors import UserError
from solar_mega.train.loop import Feed, Surroundings, Work, train
from solar_mega.train.step import NEXT_TOKEN, Objective, next_token_loss
from tests.train.tiny import BATCH, SEQUENCE, Case, batches, one_rank, start

CASES = {
    "fp32": Case(),
    "fp32 without distributed optimizer": Case().on(distributed_optimizer=False),
    "bf16": replace(Case(), precision="bf16"),
}


def poisonable(chunk, batch):
    return next_token_loss(chunk, batch) * batch.get("factor", 1.0)


def poison_loss(batch):
    return {**batch, "factor": math.nan}


class InfiniteGradient(torch.autograd.Function):
    """x -> x, with a gradient of infinity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def infinite_gradient(chunk, batch):
    return InfiniteGradient.apply(next_token_loss(chunk, batch))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_updated(case, where):
    """And the run could go on: the step after it is the one that would have come anyway."""
    with one_rank(case.parallel):
        chunks, trainer = start(case)
        _, untouched = start(case)
        data, micro_batches = batches(case)
        trainer.step(data, micro_batches)
        before = [p.detach().clone() for p in chunks[0].parameters()]
        rate = trainer.optimizer.param_groups[0]["lr"]

        bad = [next(data) for _ in range(micro_batches)]
        trainer.objective = Objective(poisonable)
        if where == "loss":
            bad[-1] = poison_loss(bad[-1])
        else:
            trainer.objective = Objective(infinite_gradient)
        result = trainer.step(iter(bad), micro_batches)
        trainer.objective = NEXT_TOKEN
        assert not result.updated
        assert not math.isfinite(result.loss if where == "loss" else result.grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
        assert trainer.optimizer.param_groups[0]["lr"] == rate

        after = trainer.step(data, micro_batches)
        data, _ = batches(case)
        untouched.step(data, micro_batches)
        for _ in range(micro_batches):
            next(data)
        assert after == untouched.step(data, micro_batches)


@dataclass
class Recorded:
    """Saves nothing; remembers when it was asked to."""

    steps: list[int]

    def save(self, step):
        self.steps.append(step)

    save_last = save

    def poll(self): ...


def test_the_loop_names_step_and_samples(tmp_path):
    case = Case(micro_batch_size=BATCH)
    saved = []
    with one_rank():
        _, trainer = start(case)
        trainer.objective = Objective(poisonable)
        data, micro_batches = batches(case)

        def poisoned():
            for number, batch in enumerate(data):
                yield poison_loss(batch) if number == 4 else batch

        feed = Feed(poisoned(), None, micro_batches, 0, lambda: 0.0)
        config = TrainConfig(steps=9, seq_length=SEQUENCE, global_batch_size=BATCH, eval_samples=0)
        with pytest.raises(UserError) as caught:
            train(
                trainer,
                feed,
                Work(BATCH * SEQUENCE, 1.0, 1, None),
                config,
                CheckpointConfig(interval=2),
                Surroundings(Recorded(saved), directory=tmp_path),
            )
    message = str(caught.value)
    assert message.startswith("step 5: loss nan")
    assert f"samples {4 * BATCH} to {5 * BATCH - 1}" in message and "optimizer.lr" in message
    assert saved == [2, 4]  # and nothing afterwards
