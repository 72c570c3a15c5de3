"""Every method against an fp64 implementation of its formula, written independently and on whole tensors."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from solar_mega.merge.arithmetic import _bucket, slerp_coefficients
from solar_mega.merge.plan import plan_merge
from solar_mega.merge.recipe import MergeConfig, recipe_of
from solar_mega.merge.run import merge


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def merged(
    out: Path, method: str, models: list[Path], threads: int = 2, **options
) -> dict[str, torch.Tensor]:
    shard_bytes = options.pop("shard_bytes", 5 * 10**9)
    config = MergeConfig(out=out, method=method, models=tuple(models), **options)
    merge(plan_merge(recipe_of(config)), out, shard_bytes, threads)
    return tensors(out)


def doubles(*directories: Path) -> list[dict[str, torch.Tensor]]:
    return [{name: t.double() for name, t in tensors(directory).items()} for directory in directories]


def assert_rounded(ours: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor, operations: int = 8) -> None:
    """One rounding to bf16 (half an ulp: 2^-8 of the value at most) on top of `operations` fp32 ones, each at
    most 2^-24 of the sum of the terms' magnitudes."""
    bound = exact.abs() * 2**-8 + terms * operations * 2**-24
    wrong = (ours.double() - exact).abs() > bound
    assert not wrong.any(), ((ours.double() - exact).abs() / bound).max()


def test_linear(family, tmp_path):
    ours = merged(tmp_path / "out", "linear", [family["a"], family["b"]], weights=(0.3, 0.7))
    a, b = doubles(family["a"], family["b"])
    assert ours.keys() == a.keys()
    for name, tensor in ours.items():
        x, y = 0.3 * a[name], 0.7 * b[name]
        assert tensor.dtype == torch.bfloat16
        assert_rounded(tensor, x + y, x.abs() + y.abs())


def test_normalized_weights_are_a_weighted_mean(family, tmp_path):
    models = [family["a"], family["b"], family["base"]]
    ours = merged(tmp_path / "out", "linear", models, weights=(1.0, 2.0, 1.0), normalize=True)
    a, b, c = doubles(*models)
    for name, tensor in ours.items():
        terms = (a[name].abs() + 2 * b[name].abs() + c[name].abs()) / 4
        assert_rounded(tensor, (a[name] + 2 * b[name] + c[name]) / 4, terms)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, sum of the terms' magnitudes) in fp64."""
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > 0.9995:
        x, y = (1 - t) * a, t * b
    else:
        theta = math.acos(cosine)
        x = math.sin((1 - t) * theta) / math.sin(theta) * a
        y = math.sin(t * theta) / math.sin(theta) * b
    return x + y, x.abs() + y.abs()


def test_slerp_with_gradient_and_filters(family, tmp_path):
    ours = merged(
        tmp_path / "out",
        "slerp",
        [family["a"], family["b"]],
        t=(0.0, 0.6, 0.9),
        t_filters=("self_attn=0.2", "mlp=1,0.5"),
    )
    a, b = doubles(family["a"], family["b"])
    gradient = {0: 0.0, 1: 0.4, 2: 0.7, 3: 0.9}  # at 0, 1/3, 2/3, 1 of (0, 0.6, 0.9)
    for name, tensor in ours.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        t = gradient[layer] if layer is not None else 0.0
        if "self_attn" in name:
            t = 0.2
        elif "mlp" in name:
            t = 1 - 0.5 * layer / 3
        exact, terms = slerp(a[name], b[name], t)
        # theta is known to the fp32 rounding of the dot products
        assert_rounded(tensor, exact, terms, operations=64)


def test_slerp_ends_are_the_models(family, tmp_path):
    a, b = tensors(family["a"]), tensors(family["b"])
    for t, expected in ((0.0, a), (1.0, b)):
        ours = merged(tmp_path / f"t{t}", "slerp", [family["a"], family["b"]], t=(t,))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_slerp_of_a_model_with_itself_is_the_model(family, tmp_path, copy_of):
    ours = merged(tmp_path / "out", "slerp", [family["a"], copy_of("a")], t=(0.37,))
    expected = tensors(family["a"])
    assert all(torch.equal(ours[name], expected[name]) for name in expected), (
        "every tensor falls back to LERP"
    )


def test_slerp_of_deltas(family, tmp_path):
    ours = merged(tmp_path / "out", "delta_slerp", [family["a"], family["b"]], t=(0.4,), base=family["base"])
    a, b, base = doubles(family["a"], family["b"], family["base"])
    for name, tensor in ours.items():
        arc, terms = slerp(a[name] - base[name], b[name] - base[name], 0.4)
        assert_rounded(tensor, base[name] + arc, terms + base[name].abs(), operations=64)


def test_coefficients_approach_linear_ones():
    left, right = slerp_coefficients(math.acos(0.9996), 0.3, lerp=False)
    assert (left, right) == pytest.approx(slerp_coefficients(0.0, 0.3, lerp=True), abs=1e-4)


def test_task_arithmetic(family, tmp_path):
    options = dict(base=family["base"], weights=(0.6, 0.5), scale=0.8)
    ours = merged(tmp_path / "out", "task_arithmetic", [family["a"], family["b"]], **options)
    a, b, base = doubles(family["a"], family["b"], family["base"])
    for name, tensor in ours.items():
        x, y = 0.6 * (a[name] - base[name]), 0.5 * (b[name] - base[name])
        assert_rounded(tensor, base[name] + 0.8 * (x + y), base[name].abs() + x.abs() + y.abs())


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The k largest entries, the first among equal ones, by a stable sort."""
    keep = max(1, int(density * delta.numel()))
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices[:keep]
    mask = torch.zeros(delta.numel(), dtype=torch.float64)
    mask[order] = 1
    return delta * mask.view_as(delta)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(family, tmp_path, normalize):
    options = dict(base=family["base"], weights=(0.613, 0.937), density=0.3, scale=0.7, normalize=normalize)
    ours = merged(tmp_path / "out", "ties", [family["a"], family["b"]], **options)
    a, b, base = doubles(family["a"], family["b"], family["base"])
    for name, tensor in ours.items():
        deltas = [0.613 * trimmed(a[name] - base[name], 0.3), 0.937 * trimmed(b[name] - base[name], 0.3)]
        sign = torch.where(sum(deltas) >= 0, 1.0, -1.0).double()
        agreeing = [delta * (delta.sign() == sign) for delta in deltas]
        divisor = sum(
            weight * (delta.sign() == sign).double()
            for weight, delta in zip((0.613, 0.937), deltas, strict=True)
        )
        mixed = sum(agreeing)
        if normalize:
            mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
        exact = base[name] + 0.7 * mixed
        assert_rounded(tensor, exact, base[name].abs() + sum(d.abs() for d in deltas), operations=16)


def test_the_kth_largest_of_few_values():
    counts = torch.tensor([4, 0, 2, 1])  # one 3, two 2s, four 0s
    assert [_bucket(counts, k) for k in (1, 2, 3, 4, 7)] == [(3, 0), (2, 1), (2, 1), (0, 3), (0, 3)]


def test_dare_keeps_a_share_and_rescales_it(family, tmp_path):
    options = dict(base=family["base"], weights=(1.0,), density=0.25, seed=5)
    ours = merged(tmp_path / "out", "dare_linear", [family["a"]], dtype="fp32", **options)
    a, base = doubles(family["a"], family["base"])
    name = "model.embed_tokens.weight"
    delta = a[name] - base[name]
    found = ours[name].double() - base[name]
    moved = delta != 0
    kept = (found.abs() > 0) & moved
    count = int(moved.sum())
    share = float(kept.sum()) / count
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count), "five standard deviations"
    assert torch.allclose(found[kept], 4 * delta[kept], rtol=0, atol=2**-22)


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_depends_on_the_seed_alone(family, tmp_path, method):
    def result(name: str, **options):
        both = [family["a"], family["b"]]
        return merged(tmp_path / name, method, both, base=family["base"], density=0.5, **options)

    first = result("one", seed=1, threads=1)
    again = result("two", seed=1, threads=3, shard_bytes=100_000)
    other = result("other", seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pickled_weights_merge_like_safetensors(family, tmp_path, copy_of):
    pickled = copy_of("b")
    for file in [*pickled.glob("*.safetensors"), pickled / "model.safetensors.index.json"]:
        file.unlink()
    torch.save(tensors(family["b"]), pickled / "pytorch_model.bin")
    ours = merged(tmp_path / "out", "slerp", [family["a"], pickled], t=(0.3,))
    expected = merged(tmp_path / "expected", "slerp", [family["a"], family["b"]], t=(0.3,))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_fp32_inputs_and_result(family, tmp_path):
    """Inputs of different dtypes meet in fp32, and --dtype fp32 keeps what bf16 would round away."""
    wide = merged(tmp_path / "wide", "linear", [family["a"], family["b"]], dtype="fp32")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    mixed = merged(tmp_path / "mixed", "linear", [tmp_path / "wide", family["a"]])
    a, b = doubles(tmp_path / "wide", family["a"])
    for name, tensor in mixed.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), (a[name] + b[name]) / 2, rtol=2**-23, atol=2**-30)
