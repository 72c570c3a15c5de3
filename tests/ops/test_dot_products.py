"""The three dot products of SLERP's angle against fp64."""

import pytest
import torch
from torch.library import opcheck

from solar_mega import ops
from solar_mega.ops.dot_products import dot_products, dot_products_reference
from tests.ops.devices import DTYPES, NARROWER, run_again_on

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


def vectors(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """a, b and a base, all shifted the same way: differences are small beside the values."""
    random = torch.Generator().manual_seed(elements)
    return (torch.randn(3, elements, generator=random) * 0.1 + 1).to(dtype)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 15, 1024, 1025, 100_003])
def test_matches_fp64(elements, dtype, with_base):
    a, b, origin = vectors(elements, dtype)
    base = origin if with_base else None
    got, exact = dot_products(a, b, base), dot_products_reference(a, b, base)
    x, y = (v.double() - (origin.double() if with_base else 0.0) for v in (a, b))
    sizes = torch.stack((x.dot(x), y.dot(y), x.abs().dot(y.abs())))
    # fp32 roundings of a term: difference twice, product, and those of at most 1024 additions in a block,
    # which err like their square root; 64 covers the worst vector width too.
    assert ((got - exact).abs() <= 64 * 2**-24 * sizes).all()
    assert got.dtype == torch.float64


def test_many_equal_terms_do_not_drift():
    """A plain fp32 sum of 2^25 ones stops at 2^24."""
    ones = torch.ones(1 << 25)
    assert dot_products(ones, ones).tolist() == [1 << 25] * 3


def test_nan_is_passed_on():
    a, b, _ = vectors(5000, torch.bfloat16)
    a[4321] = float("nan")
    got = dot_products(a, b)
    assert got[0].isnan() and got[2].isnan() and not got[1].isnan()


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_vectors(isa):
    run_again_on(isa, __file__, "fp64 or drift or nan")


def test_bad_calls_are_explained():
    a, b, base = vectors(8, torch.float32)
    for arguments, said in (
        ((a.double(), b, None), "a has dtype Double; allowed: Float, BFloat16, Half"),
        ((a, b.bfloat16(), None), "b has dtype BFloat16; it must be Float"),
        ((a, b[:4], None), r"b has shape \[4\].*must be \[8\]"),
        ((a, b, base[::2]), r"base has shape \[4\]"),
        ((a[None], b, None), r"a has shape \[1, 8\].*allowed: \[elements\], contiguous"),
    ):
        with pytest.raises(RuntimeError, match=said):
            dot_products(*arguments)


def test_opcheck():
    a, b, base = vectors(100, torch.bfloat16)
    for origin in (None, base):
        opcheck(torch.ops.solar_mega.dot_products.default, (a, b, origin))
