"""Samples packed into one row give what they give apart, on every back end, recompute mode and layout."""

import itertools

import pytest
import torch

from solar_mega.config.schema import KernelConfig, OptimizerConfig, ScheduleConfig
from tests.distributed import run_ranks
from tests.ranks import layout
from tests.train.tiny import SEQUENCE, VOCABULARY, Case, one_rank, start

LENGTHS = (5, 9, 6)  # and padding
CASE = Case(
    micro_batch_size=1,
    steps=3,
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0),
    schedule=ScheduleConfig(kind="constant"),
)
ATTENTION = ("fused", "sdpa", "reference")
RECOMPUTE = ("selective", "full")


def _samples(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in LENGTHS:
        text = torch.randint(0, VOCABULARY, (n + 1,), generator=generator)
        mask = (torch.rand(n, generator=generator) < 0.6).float()
        mask[-1] = 1.0
        made.append({"tokens": text[:-1], "labels": text[1:], "loss_mask": mask})
    return made


def _packed(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    rest = SEQUENCE - sum(LENGTHS)
    row = {
        key: torch.cat([s[key] for s in samples] + [samples[0][key].new_zeros(rest)]) for key in samples[0]
    }
    row["position_ids"] = torch.cat([torch.arange(n) for n in (*LENGTHS, rest)])
    bounds = [0, *itertools.accumulate((*LENGTHS, rest))]
    return {key: t[None] for key, t in row.items()} | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def _apart(samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    rows = []
    for sample in samples:
        pad = SEQUENCE - len(sample["tokens"])
        row = {key: torch.nn.functional.pad(t, (0, pad)) for key, t in sample.items()}
        row["position_ids"] = torch.arange(SEQUENCE)
        rows.append({key: t[None] for key, t in row.items()})
    return rows


def _steps(case: Case, packed: bool) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of two packed rows, or of the six samples in them."""
    _, trainer = start(case)
    results = []
    for step in range(case.steps):
        pairs = [_samples(2 * step), _samples(2 * step + 1)]
        batches = [_packed(s) for s in pairs] if packed else [row for s in pairs for row in _apart(s)]
        result = trainer.step(iter(batches), len(batches))
        results.append((result.loss, result.grad_norm))
    return results


@pytest.fixture(scope="module")
def results():
    found = {}
    with one_rank():
        found["apart"] = _steps(CASE, packed=False)
        for attention in ATTENTION:
            kernels = KernelConfig(attention=attention)
            found[attention] = _steps(Case(**{**vars(CASE), "kernels": kernels}), packed=True)
        for recompute in RECOMPUTE:
            found[recompute] = _steps(Case(**{**vars(CASE), "recompute": recompute}), packed=True)
    return found


@pytest.mark.parametrize("name", ATTENTION + RECOMPUTE)
def test_packed_samples_train_as_they_do_apart(results, name):
    """Losses and gradient norms of three steps; fp32, whose sums go in another order."""
    for got, want in zip(results[name], results["apart"], strict=True):
        assert got == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_sample_sees_another(attention):
    from solar_mega.model.packing import packing

    with one_rank():
        (chunk,), _ = start(Case(**{**vars(CASE), "kernels": KernelConfig(attention=attention)}))
        batch = _packed(_samples(1))
        options = {"packed_seq_params": packing(batch["cu_seqlens"], torch.device("cpu"))}
        with torch.no_grad():
            want = chunk(batch["tokens"], batch["position_ids"], None, **options)[0]
            other = batch["tokens"].clone()
            other[0, 5:14] = (other[0, 5:14] + 17) % VOCABULARY
            got = chunk(other, batch["position_ids"], None, **options)[0]
            apart = chunk(batch["tokens"][:, 5:14], None, None)[0]
    assert torch.equal(got[:5], want[:5]) and torch.equal(got[14:], want[14:])
    assert (got[5:14] - want[5:14]).abs().max() > 1e-2
    torch.testing.assert_close(want[5:14], apart, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "tp2 with sequence parallelism": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "pp2 vpp2": dict(pp=2, vpp=2),
    "dp2": dict(),
}


def _on_layouts() -> dict[str, list[tuple[float, float]]]:
    found = {}
    for name, sizes in LAYOUTS.items():
        with layout(**sizes) as parallel:
            recompute = "full" if "tp" in sizes else "none"
            case = Case(**{**vars(CASE), "parallel": parallel, "recompute": recompute})
            if name == "dp2":
                found[name] = _data_parallel_steps(case)
            else:
                found[name] = _steps(case, packed=True)
    return found


def _data_parallel_steps(case: Case) -> list[tuple[float, float]]:
    from megatron.core import parallel_state

    _, trainer = start(case)
    rank, results = parallel_state.get_data_parallel_rank(), []
    for step in range(case.steps):
        result = trainer.step(iter([_packed(_samples(2 * step + rank))]), 1)
        results.append((result.loss, result.grad_norm))
    return results


def test_packed_samples_on_two_ranks(results):
    for found in run_ranks(_on_layouts, 2):
        for name, steps in found.items():
            for got, want in zip(steps, results["apart"], strict=True):
                assert got == pytest.approx(want, rel=5e-6), name


def test_a_packing_must_fit_its_row():
    from solar_mega.model.packing import packing

    cpu, row = torch.device("cpu"), torch.zeros(8, 1, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[2\], torch.int64"):
        packing(torch.tensor([0, 8]), cpu)
    seven = packing(torch.tensor([0, 3, 7], dtype=torch.int32), cpu)
    with pytest.raises(ValueError, match="b = 1, s = 8 and samples from 0 to 7"):
        seven.check(row)
    with pytest.raises(ValueError, match="b = 2, s = 7"):
        seven.check(torch.zeros(7, 2, 2, 4))
