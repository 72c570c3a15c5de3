"""The same YAML through mergekit and through here. Needs `mergekit-yaml` on the PATH."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.errors import UserError
from solar_mega.merge.mergekit import read_mergekit
from tests.merge.test_arithmetic import doubles, slerp, tensors

needs_mergekit = pytest.mark.skipif(
    not shutil.which("mergekit-yaml"), reason="mergekit-yaml is not on the PATH"
)

LINEAR = """
merge_method: linear
models:
  - model: {a}
    parameters: {{weight: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5}}
dtype: bfloat16
"""

SLERP = """
merge_method: slerp
base_model: {a}
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 4]}}
      - {{model: {b}, layer_range: [0, 4]}}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""

TASK = """
merge_method: {method}
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.613, density: 0.4}}
  - model: {b}
    parameters: {{weight: [0.937, 0.2], density: 0.4}}
parameters: {{lambda: 0.7{normalize}}}
dtype: float32
"""


def write(tmp_path: Path, text: str, **names) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(text.format(**names))
    return path


def both(recipe: Path, tmp_path: Path) -> tuple[Path, Path]:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["merge", "--config", str(recipe), "--out", str(ours)]) == 0
    done = subprocess.run(
        ["mergekit-yaml", str(recipe), str(theirs), "--quiet", "--copy-tokenizer"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return ours, theirs


def ulp(x: torch.Tensor) -> torch.Tensor:
    """Distance of bf16 neighbours at |x|."""
    return torch.exp2(torch.floor(torch.log2(x.double().abs().clamp_min(2**-126))) - 7)


def assert_within_one_ulp(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *models) -> None:
    """Or, where two terms cancel and an ulp of what is left says nothing, within their own fp32 rounding."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype == torch.bfloat16
        apart = (tensor.double() - other.double()).abs()
        cancelled = 8 * 2**-24 * sum(model[name].abs() for model in models)
        assert (apart <= torch.maximum(torch.maximum(ulp(tensor), ulp(other)), cancelled)).all(), name


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Root mean square of the error, over all elements."""
    squares = [(found[n].double() - exact[n]).square().flatten() for n in exact]
    return torch.cat(squares).mean().sqrt().item()


@needs_mergekit
def test_average(family, tmp_path):
    ours, theirs = map(tensors, both(write(tmp_path, LINEAR, **family), tmp_path))
    a, b = doubles(family["a"], family["b"])
    assert_within_one_ulp(ours, theirs, a, b)
    exact = {name: (a[name] + b[name]) / 2 for name in a}
    assert errors(ours, exact) <= errors(theirs, exact)


@needs_mergekit
def test_slerp(family, tmp_path):
    ours, theirs = map(tensors, both(write(tmp_path, SLERP, **family), tmp_path))
    a, b = doubles(family["a"], family["b"])
    assert_within_one_ulp(ours, theirs, a, b)
    exact = {name: slerp(a[name], b[name], _t(name))[0] for name in a}
    assert errors(ours, exact) <= errors(theirs, exact) * 1.0001, "no worse; both round once"


def _t(name: str) -> float:
    for part, values in (("self_attn", (0, 0.5, 0.3, 0.7, 1)), ("mlp", (1, 0.5, 0.7, 0.3, 0))):
        if part in name:
            place = int(name.split(".")[2]) / 3 * 4
            left = min(int(place), 3)
            return values[left] + (place - left) * (values[left + 1] - values[left])
    return 0.5


@needs_mergekit
@pytest.mark.parametrize(
    "method, normalize", [("task_arithmetic", ""), ("ties", ""), ("ties", ", normalize: 0")]
)
def test_differences_from_a_base(wide_family, tmp_path, method, normalize):
    """In fp32, where both compute alike."""
    recipe = write(tmp_path, TASK, method=method, normalize=normalize, **wide_family)
    ours, theirs = map(tensors, both(recipe, tmp_path))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


def test_everything_in_a_recipe_is_read(family, tmp_path):
    recipe = read_mergekit(write(tmp_path, TASK, method="ties", normalize="", **family), seed=3)
    assert (recipe.method, recipe.base, recipe.dtype, recipe.seed) == ("ties", family["base"], "F32", 3)
    (piece,) = recipe.slices
    assert [part.model for part in piece.parts] == [family["a"], family["b"]]
    assert piece.parts[1].settings["weight"].at("any", 0.5) == pytest.approx((0.937 + 0.2) / 2)
    assert recipe.settings["lambda"].at("any", 0.0) == 0.7


def test_what_is_not_understood_is_an_error(family, tmp_path):
    text = """
    merge_method: slerp
    base_model: {a}
    models:
      - {{model: {a}, weight: 3}}
      - {{model: {b}+lora}}
    parameters: {{t: high, density: 0.5}}
    tokenizer_source: union
    chat_template: auto
    dtype: int4
    """
    with pytest.raises(UserError) as error:
        read_mergekit(write(tmp_path, text, **family))
    for said in (
        "chat_template: not supported",
        "models[0]: weight is unknown",
        "adapters",
        "parameters.t = 'high'",
        "density is unknown for slerp",
        "vocabularies are not merged",
        'dtype = "int4"',
    ):
        assert said in str(error.value), said


@pytest.mark.parametrize(
    "text, said",
    [
        ("merge_method: della\nmodels: []", 'merge_method = "della"'),
        ("- a\n- b", "expected keys"),
        ("a: [", "not valid YAML"),
        (
            "merge_method: slerp\nbase_model: x\nslices: [{{sources: [{{model: x, layer_range: [3, 1]}}]}}]",
            "empty",
        ),
        ("merge_method: linear", "exactly one of models and slices"),
    ],
)
def test_broken_recipes(tmp_path, text, said):
    with pytest.raises(UserError, match="(?s)" + said.replace("[", r"\[")):
        read_mergekit(write(tmp_path, text))
