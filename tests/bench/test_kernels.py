"""The kernel and DPO benchmarks at toy size: every provider right, a report to read, a picture."""

import json

import pytest
import torch

from solar_mega import ops
from solar_mega.bench import dpo, kernels, measure
from solar_mega.bench.cases import OPERATIONS, Shape, call_for, fp64
from solar_mega.bench.command import bench
from solar_mega.bench.peers import PEERS
from solar_mega.errors import UserError

TINY = dict(
    tokens=24, hidden=32, ffn=40, vocab=96, heads=4, kv_heads=2, head_dim=8, head_hidden=16, pairs=3, rounds=3
)
SHAPE = Shape(8192, 4096, 14336, 32000, 32, 8, 128, 4096, 8, torch.bfloat16)
COMMON = ("torch eager", "torch F.rms_norm", "torch F.cross_entropy", "megatron local", "megatron fused")
COMMON += ("solar_mega, weights given",)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def floor_megabytes(operation: str, mode: str) -> float:
    floors = {m.name: m.floor_bytes for m in OPERATIONS[operation].modes}
    return round(floors[mode](SHAPE) / 1e6, 1)


def test_floor_bytes_at_8192_tokens():
    """By hand: 8192 x 4096 x 2 B = 67.11 MB a pass, 8192 x 32000 x 2 B = 524.29 MB."""
    assert floor_megabytes("rms_norm", "forward") == 134.3
    assert floor_megabytes("rms_norm", "backward") == 201.4
    assert floor_megabytes("add_rms_norm", "forward") == 268.5
    assert floor_megabytes("add_rms_norm", "backward") == 268.5
    assert floor_megabytes("qkv_rotary", "forward") == 172.0
    assert floor_megabytes("swiglu", "forward") == 704.6
    assert floor_megabytes("swiglu", "backward") == 1174.4
    assert floor_megabytes("token_logprob", "forward") == 524.3
    assert floor_megabytes("token_logprob", "both") == 1572.9


def test_report_of_every_operation(tmp_path, capsys):
    out, plot = tmp_path / "deep" / "kernels.json", tmp_path / "plots" / "kernels.png"
    report = kernels.run(kernels.KernelBench(**TINY, providers=COMMON, threads=1, out=out, plot=plot))
    assert json.loads(out.read_text()) == report
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert report["device"] and report["versions"]["torch"] and report["date"] and report["threads"] == 1
    assert report["copy_bytes_per_second"] > 0 and report["shape"]["dtype"] == "float32"

    measured = {(r["operation"], r["mode"]) for r in report["results"]}
    assert measured == {(op.name, mode.name) for op in OPERATIONS.values() for mode in op.modes}
    assert set(report["floors"]) == {f"{op} {mode}" for op, mode in measured}
    for r in report["results"]:
        assert r["problem"] is None, r
        assert r["eager"]["calls"] == 3 and r["eager"]["p20"] <= r["eager"]["p50"] <= r["eager"]["p80"]
        assert r["graph"] is None and r["ours_is_times_as_fast"] > 0
        assert r["extra_bytes"] > 0
        # Megatron's fused cross entropy rounds its gradient to bf16 whatever it is given.
        assert r["error"] < (5e-3 if r["provider"] == "megatron fused" else 2e-6), r
        assert r["repeatable"] or r["provider"] != "solar_mega"
        assert ("share_of_copy" in r) == (r["operation"] != "linear_token_logprob")
    printed = capsys.readouterr().out
    assert "of copy" in printed and "token_logprob both" in printed


def test_a_backward_leaves_no_more_than_its_outputs():
    """Extra memory is exact where it is known: dx, dweight and the partial sums of RMSNorm's backward."""
    operation, device = OPERATIONS["rms_norm"], torch.device("cpu")
    shape = Shape(64, 128, 8, 8, 1, 1, 2, 8, 1, torch.float32)
    inputs = operation.draw(shape, device)
    forward = call_for(operation, operation.providers["solar_mega"], "forward", inputs)
    if ops.available():
        assert measure.extra_memory(forward, device) == 4 * (64 * 128 + 64)  # y and rstd
    eager = call_for(operation, operation.providers["torch F.rms_norm"], "backward", inputs)
    assert measure.extra_memory(eager, device) >= 4 * (64 * 128 + 128)


def test_overwritten_inputs_do_not_reach_the_next_provider():
    """Ours writes its gradient over the logits; every provider must still be judged on the same numbers."""
    operation, device = OPERATIONS["token_logprob"], torch.device("cpu")
    shape = Shape(16, 8, 8, 64, 1, 1, 2, 8, 1, torch.float32)
    inputs = operation.draw(shape, device)
    before = {name: t.clone() for name, t in inputs.items()}
    exact = call_for(operation, operation.reference, "both", fp64(inputs))()
    for name in ("solar_mega", "torch eager"):
        result = kernels.Result("token_logprob", "both", name)
        kernels._judge(result, operation, operation.providers[name], inputs, exact, device)
        assert result.error < 1e-6 and result.repeatable
    assert all(torch.equal(inputs[name], t) for name, t in before.items())


def test_peers_that_are_missing_or_broken_are_reported(monkeypatch):
    def absent():
        raise ImportError("no such module")

    def broken():
        raise RuntimeError("needs a GPU\nand more")

    def wrong():
        return lambda i: 1 / 0

    monkeypatch.setitem(PEERS, "rms_norm", {"absent": absent, "broken": broken, "wrong": wrong})
    wanted = ("absent", "broken", "wrong")
    report = kernels.run(kernels.KernelBench(**TINY, ops=("rms_norm",), providers=wanted, threads=1))
    problems = {r["provider"]: r["problem"] for r in report["results"] if r["mode"] == "forward"}
    assert problems == {
        "solar_mega": None,
        "absent": "not installed",
        "broken": "RuntimeError: needs a GPU",
        "wrong": "ZeroDivisionError: division by zero",
    }


def test_every_peer_names_an_operation_of_ours():
    assert set(PEERS) == set(OPERATIONS)
    assert all(next(iter(op.providers)) == kernels.OURS for op in OPERATIONS.values())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"ops": ("softmax",)},
            "--ops softmax: unknown; allowed: rms_norm add_rms_norm qkv_rotary swiglu token_logprob "
            "linear_token_logprob dpo_loss$",
        ),
        ({"providers": ("tritton",)}, "--providers tritton: unknown; allowed: .*, torch.compile, .*$"),
        ({"tokens": 0}, "--tokens 0: must be at least 1"),
        ({"heads": 6, "kv_heads": 4}, "--heads 6 must be a multiple of --kv-heads 4"),
        ({"head_dim": 5}, "--head-dim 5 must be even"),
        ({"tokens": 8, "pairs": 5}, "--tokens 8 must be at least 2 per pair, --pairs 5"),
    ],
)
def test_kernel_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        kernels.run(kernels.KernelBench(**options))


def test_dpo_report(tmp_path, capsys):
    out = tmp_path / "dpo.json"
    providers = ("solar_mega, all logits", "torch eager, all logits", "liger")
    options = dict(pairs=2, length=64, hidden=16, vocab=1024, rounds=3, threads=1)
    report = dpo.run(dpo.DPOBench(**options, providers=providers, out=out))
    assert json.loads(out.read_text()) == report
    assert report["shape"]["tokens"] == 256 and report["shape"]["logits_bytes"] == 256 * 1024 * 4
    entries = report["providers"]
    assert list(entries) == ["solar_mega", *providers]
    measured = {name: e for name, e in entries.items() if e["problem"] is None}
    assert set(measured) >= set(entries) - {"liger"}
    for name, e in measured.items():
        assert e["loss"] == pytest.approx(entries["solar_mega"]["loss"], rel=1e-5)
        assert e["error"] < 1e-5 and e["seconds"]["calls"] == 3, name
    assert entries["solar_mega"]["repeatable"]
    # All logits take 1 MiB and log_softmax keeps two more of that; ours holds 1/16 at a time.
    assert entries["torch eager, all logits"]["extra_bytes"] >= 2 * 2**20
    assert entries["solar_mega"]["extra_bytes"] < 2**19
    assert "loss + gradients" in capsys.readouterr().out


def test_chosen_first_is_undone_by_its_order():
    batch = dpo._draw(dpo.DPOBench(pairs=2, length=3, hidden=4, vocab=8), torch.device("cpu"))
    given, order = dpo.chosen_first(batch)
    assert order.tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    assert torch.equal(torch.empty_like(batch.hidden).index_copy_(0, order, given.hidden), batch.hidden)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"providers": ("trl",)}, "--providers trl: unknown; allowed: solar_mega, "),
        ({"pairs": 0}, "--pairs 0: must be at least 1"),
    ],
)
def test_dpo_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        dpo.run(dpo.DPOBench(**options))


def test_command_line(tmp_path, capsys):
    out = tmp_path / "x.json"
    words = [
        "--ops",
        "dpo_loss",
        "--tokens",
        "24",
        "--pairs",
        "3",
        "--rounds",
        "3",
        "--providers",
        "torch eager",
    ]
    assert bench(["kernels", *words, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["bench"] == "kernels"
    assert bench([]) == 2 and bench(["--help"]) == 0
    printed = capsys.readouterr().out
    listed = [line.split()[0] for line in printed.split("WHAT --help\n\n")[-1].splitlines()]
    with pytest.raises(UserError) as refused:
        bench(["speed"])
    assert str(refused.value) == f"bench speed: unknown; allowed: {', '.join(listed)}"
