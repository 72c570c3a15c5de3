"""The step benchmark at toy size: same weights and batches for every provider, and a result to read."""

import json
from pathlib import Path

import pytest
import torch

from solar_mega.bench.step import StepBench, run
from solar_mega.errors import UserError

TINY = dict(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=96, seq_length=16, rounds=2, threads=1)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_providers_take_the_same_steps(tmp_path, precision, capsys):
    out = tmp_path / "deep" / "step.json"
    peers = ("transformers", "megatron", "reference")
    report = run(StepBench(**TINY, precision=precision, out=out, profile=True, peers=peers))
    assert json.loads(out.read_text()) == report
    assert report["shape"] == {**TINY, "batch": 2, "precision": precision, "profile": True}
    assert report["torch"] == torch.__version__ and report["device"]
    assert list(report["providers"]) == ["solar_mega", *peers]
    assert sum(report["profile"].values()) == pytest.approx(1, abs=0.01)
    assert any(name.startswith("solar_mega::") for name in report["profile"])
    # bf16 implementations round in different places: 2^-8 of a logit, averaged over 32 tokens.
    tolerance = {"fp32": 1e-4, "bf16": 2**-8}[precision]
    ours = report["providers"]["solar_mega"]
    for provider in report["providers"].values():
        assert provider["first_loss"] == pytest.approx(ours["first_loss"], abs=tolerance)
        assert provider["final_loss"] == pytest.approx(ours["final_loss"], abs=10 * tolerance)
        assert provider["final_loss"] != provider["first_loss"]
        assert (
            provider["tokens_per_second"] > 0 and provider["median_seconds"] > 0 and provider["tflops"] >= 0
        )
        assert provider["ours_over_this"] > 0
    assert ours["ours_over_this"] == 1.0
    assert "ours is x times as fast" in capsys.readouterr().out


def test_unknown_peer():
    with pytest.raises(
        UserError, match="--peers nanogpt: unknown; allowed: solar_mega transformers megatron"
    ):
        run(StepBench(peers=("nanogpt",)))


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(StepBench(**TINY, peers=()))
    assert not list(Path(tmp_path).iterdir())
