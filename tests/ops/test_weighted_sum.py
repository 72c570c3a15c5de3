"""Weighted sums of stored weights against fp64: one rounding, and nothing infinite passes unseen."""

import itertools

import pytest
import torch
from torch.library import opcheck

from solar_mega import ops
from solar_mega.ops.weighted_sum import weighted_sum
from tests.ops.devices import DTYPES, NARROWER, run_again_on

IMPLEMENTATIONS = [
    pytest.param("fused", marks=pytest.mark.skipif(not ops.available(), reason=ops.report())),
    "reference",
]
WEIGHTS = (0.3, 0.7, -0.4)
SIZES = (1, 7, 2048, 5003)


def inputs(count: int, elements: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(elements)
    rows = torch.randn(count + 1, elements, generator=random).to(dtype)
    return list(rows[:-1]), rows[-1]


def summed(x, weights, base, dtype, implementation="fused"):
    out = torch.empty(len(x[0]), dtype=dtype)
    assert weighted_sum(x, weights, base, out=out, implementation=implementation)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_matches_fp64(stored, count, with_base, implementation):
    weights = WEIGHTS[:count]
    for elements, written in itertools.product(SIZES, DTYPES):
        x, origin = inputs(count, elements, stored)
        base = origin if with_base else None
        got = summed(x, weights, base, written, implementation)
        offset = origin.double() if with_base else 0.0
        terms = [weight * (row.double() - offset) for row, weight in zip(x, weights, strict=True)]
        exact = sum(terms) + offset
        # One rounding to what is written, on top of fp32's: of each weight, difference, product and sum.
        size = sum(term.abs() for term in terms) + abs(offset)
        unit = torch.finfo(written)
        bound = exact.abs() * unit.eps / 2 + size * (3 * count + 1) * 2**-24 + unit.smallest_normal
        assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("written", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1000, 2048, 4999])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_seen_wherever_it_is(written, place, bad, implementation):
    for count in (1, 2, 3):
        x, _ = inputs(count, 5000, torch.bfloat16)
        out = torch.empty(5000, dtype=written)
        x[-1][place] = bad
        assert not weighted_sum(x, WEIGHTS[:count], out=out, implementation=implementation)
        assert not out[place].isfinite() and out.isfinite().sum() == 4999


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_fits_only_the_wider_dtype_is_seen(implementation):
    x = [torch.full((100,), 60000.0), torch.full((100,), 60000.0)]
    for weights, fits in (((1.0, 0.0), True), ((1.0, 1.0), False)):
        out = torch.empty(100, dtype=torch.float16)
        assert weighted_sum(x, weights, out=out, implementation=implementation) == fits
    large = [torch.full((5000,), 3e38), torch.full((5000,), 3e38)]
    kept = torch.empty(5000)
    assert weighted_sum(large, (0.5, 0.5), out=kept, implementation=implementation), "each is finite"


@pytest.mark.skipif(not ops.available(), reason=ops.report())
@pytest.mark.parametrize("with_base", [False, True])
def test_an_element_does_not_depend_on_its_neighbours(with_base):
    """So cutting a tensor into chunks elsewhere, or other vectors' tails, change no bit."""
    for count in (2, 3):
        x, origin = inputs(count, 5003, torch.bfloat16)
        whole = summed(x, WEIGHTS[:count], origin if with_base else None, torch.bfloat16)
        for start, end in ((1, 5003), (17, 40), (4000, 4001)):
            base = origin[start:end] if with_base else None
            part = summed([row[start:end] for row in x], WEIGHTS[:count], base, torch.bfloat16)
            assert torch.equal(part, whole[start:end])


@pytest.mark.skipif(not ops.available(), reason=ops.report())
@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_vectors(isa):
    run_again_on(isa, __file__, "fp64 or seen or neighbours")


@pytest.mark.skipif(not ops.available(), reason=ops.report())
def test_bad_calls_are_explained():
    x, base = inputs(2, 8, torch.float32)
    out = torch.empty(8)
    for arguments, said in (
        (([], [], None, out), "no inputs; allowed: one or more"),
        ((x, [1.0], None, out), "1 weights for 2 inputs"),
        (([x[0], x[1].bfloat16()], [1.0, 1.0], None, out), "an input has dtype BFloat16; it must be Float"),
        (([x[0], x[1][:4]], [1.0, 1.0], None, out), r"an input has shape \[4\].*must be \[8\]"),
        ((x, [1.0, 1.0], base[::2], out), r"base has shape \[4\]"),
        ((x, [1.0, 1.0], None, out[:4]), "out has 4 elements; it must have 8"),
        ((x, [1.0, 1.0], None, out.long()), "out has dtype Long"),
        (([x[0].view(2, 4)], [1.0], None, out), r"shape \[2, 4\].*allowed: \[elements\], contiguous"),
    ):
        inputs_, weights, origin, target = arguments
        with pytest.raises(RuntimeError, match=said):
            weighted_sum(inputs_, weights, origin, out=target)


@pytest.mark.skipif(not ops.available(), reason=ops.report())
def test_opcheck():
    """Not for torch.compile, which has no ops that write to an argument and return a number."""
    x, base = inputs(2, 100, torch.bfloat16)
    for origin in (None, base):
        call = (x, [0.5, 0.5], origin, torch.empty(100))
        opcheck(
            torch.ops.solar_mega.weighted_sum_out.default,
            call,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
