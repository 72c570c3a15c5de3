"""`bench merge-error`: how far merges are from fp64, ours alone and beside mergekit's."""

import json
import shutil

import pytest

from solar_mega.bench import merge_error
from solar_mega.errors import UserError

HALF = 0.5 + 0.02
"""One rounding to bf16 is half an ulp at most; in fp32 before it, an ulp of bf16 is 2^16 ulps, and the terms
of these merges cancel to no less than 2^-8: 2^-8 per operation, at a handful of operations."""


def options(tmp_path, **more) -> merge_error.MergeErrorBench:
    return merge_error.MergeErrorBench(work=tmp_path / "work", hidden=128, **more)


def test_ours_round_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no mergekit
    merge_error.run(options(tmp_path, out=tmp_path / "errors.json"))
    results = json.loads((tmp_path / "errors.json").read_text())["results"]
    assert len(results) == 4 * 2 * 2 and {r["contestant"] for r in results} == {"solar_mega"}
    for result in results:
        # Uniform remainders have 1/4 in the mean; sums of few bf16 numbers are at times exact.
        assert result["max_ulp"] <= HALF and 0.2 < result["mean_ulp"] < 0.2505, result
    assert "mean ulp" in capsys.readouterr().out and not (tmp_path / "work").exists()


@pytest.mark.skipif(not shutil.which("mergekit-yaml"), reason="mergekit-yaml is not on the PATH")
def test_ours_are_nearer_than_mergekits(tmp_path):
    """With `dtype: bfloat16`, as recipes are written, and with float32. Where models are stored in bf16, an
    average is one rounding of an exact sum, which nothing can better: there it is a tie."""
    work = options(tmp_path, cases=("average", "slerp"))
    work.work.mkdir()
    results = list(merge_error.measure(work, "mergekit-yaml"))
    found = {(r["case"], r["stored"], r["dtype"], r["contestant"]): r for r in results}
    for (*key, contestant), ours in found.items():
        if contestant == "mergekit":
            continue
        theirs = found[(*key, "mergekit")]
        if key == ["average", "bf16", "bfloat16"]:
            assert ours["mean_ulp"] == theirs["mean_ulp"] and ours["max_ulp"] == theirs["max_ulp"] == 0.5
        elif key[2] == "bfloat16":
            assert ours["mean_ulp"] < theirs["mean_ulp"] and ours["max_ulp"] < theirs["max_ulp"], key
        else:
            # Averages in fp32 differ in the last bit of a few elements in millions.
            for which in ("mean_ulp", "max_ulp"):
                assert ours[which] <= theirs[which] * (1 + 1e-6), key


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="unknown ties, fp8; allowed: --cases average"):
        merge_error.run(options(tmp_path, cases=("ties",), stored=("fp8",)))
    with pytest.raises(UserError, match="no such executable"):
        merge_error.run(options(tmp_path, mergekit=str(tmp_path / "gone")))
