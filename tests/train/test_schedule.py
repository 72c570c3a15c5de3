"""Learning rates against closed forms, and what a resumed schedule keeps."""

import math

import pytest
import torch

from solar_mega.config.schema import OptimizerConfig, ScheduleConfig
from solar_mega.train.optimizer import build_schedule

PEAK, LEAST, STEPS, WARMUP = 3e-3, 3e-4, 100, 10
RATES = OptimizerConfig(lr=PEAK, min_lr=LEAST, weight_decay=0.1)


class Groups:
    """What a schedule asks of an optimizer: its parameter groups, one of them without decay."""

    def __init__(self) -> None:
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def rates(config: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """Rate of steps 1, 2, ..."""
    optimizer = Groups()
    schedule = build_schedule(optimizer, config, RATES, steps)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == result[-1]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        schedule.step(1)
    return result


def warm(done: int) -> float | None:
    return PEAK * done / WARMUP if done <= WARMUP else None


def cosine(done: int, end: int) -> float:
    if done > end:
        return LEAST
    return LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * (done - WARMUP) / (end - WARMUP))) / 2


@pytest.mark.parametrize("decay_steps", [None, 60])
def test_cosine(decay_steps):
    got = rates(ScheduleConfig("cosine", WARMUP, decay_steps))
    expected = [warm(k) if k <= WARMUP else cosine(k, decay_steps or STEPS) for k in range(STEPS)]
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[0] == 0 and max(got) == PEAK == got[WARMUP]


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "exponential": lambda x: 2 * 0.5**x - 1,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay_steps", [None, 30])
def test_wsd(shape, decay_steps):
    got = rates(ScheduleConfig("wsd", WARMUP, decay_steps, shape))
    length = decay_steps or STEPS // 10
    start = STEPS - length

    def expected(done: int) -> float:
        if done <= WARMUP:
            return PEAK * done / WARMUP
        if done <= start:
            return PEAK
        return LEAST + (PEAK - LEAST) * SHAPES[shape]((done - start) / length)

    assert got == pytest.approx([expected(k) for k in range(STEPS)], rel=1e-12)


@pytest.mark.parametrize("warmup", [0, WARMUP, STEPS])
def test_constant(warmup):
    got = rates(ScheduleConfig("constant", warmup))
    assert got == pytest.approx([PEAK * min(1, k / warmup) if warmup else PEAK for k in range(STEPS)])


def test_resumed_schedule_goes_on_where_it_was():
    whole = rates(ScheduleConfig("cosine", WARMUP))
    first, second = Groups(), Groups()
    schedule = build_schedule(first, ScheduleConfig("cosine", WARMUP), RATES, STEPS)
    schedule.step(37)
    resumed = build_schedule(second, ScheduleConfig("cosine", WARMUP), RATES, STEPS)
    resumed.load_state_dict(schedule.state_dict())
    assert second.param_groups[0]["lr"] == whole[37]


def test_resumed_schedule_follows_the_configuration_at_hand():
    """A run made longer, or given another peak, must not silently go by what the checkpoint remembers."""
    first, second = Groups(), Groups()
    schedule = build_schedule(first, ScheduleConfig("cosine", WARMUP), RATES, STEPS)
    schedule.step(STEPS)
    assert first.param_groups[0]["lr"] == pytest.approx(LEAST)
    longer = build_schedule(second, ScheduleConfig("cosine", WARMUP), RATES, 2 * STEPS)
    longer.load_state_dict(schedule.state_dict())
    assert second.param_groups[0]["lr"] == pytest.approx(cosine(STEPS, 2 * STEPS), rel=1e-12)


def test_rates_are_plain_numbers():
    assert all(type(rate) is float and not isinstance(rate, torch.Tensor) for rate in rates(ScheduleConfig()))
