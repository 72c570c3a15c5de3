"""The plan: its arithmetic where it can be done by hand, its search, its command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from solar_mega.__main__ import main
from solar_mega.config.check import check_run
from solar_mega.config.load import load_config
from solar_mega.config.schema import PretrainConfig
from solar_mega.model.architecture import Architecture
from solar_mega.model.layout import check_layout
from solar_mega.plan.estimate import Cluster, estimate
from solar_mega.plan.report import sheet, warnings
from solar_mega.plan.search import candidates, search
from solar_mega.runtime.gpus import GPUS, find_gpu, of_device

ROOT = Path(__file__).resolve().parents[2]
SOLAR = ROOT / "configs" / "solar_10_7b"


def solar(batch: int | None = None, **parallel: int) -> tuple[PretrainConfig, Architecture]:
    cfg = load_config(PretrainConfig, SOLAR / "2_pretrain.toml")
    cfg = replace(cfg, parallel=replace(cfg.parallel, **parallel))
    if batch is not None:
        cfg = replace(cfg, train=replace(cfg.train, global_batch_size=batch, eval_samples=batch))
    base = Architecture.from_hf(json.loads((SOLAR / "model" / "config.json").read_text()))
    return cfg, replace(base, num_layers=48)


def cluster(gpus: int, **changes) -> Cluster:
    h100 = GPUS["h100"]
    standard = Cluster(gpus, h100, 8, h100.network, 8 * 10**9, mfu=0.45, kernel_efficiency=0.6)
    return replace(standard, **changes)


def test_solar_counts_as_published():
    _, arch = solar()
    assert arch.parameters() == 10_731_524_096  # upstage/SOLAR-10.7B-v1.0


def test_one_gpu_by_hand():
    cfg, arch = solar(pp=1, vpp=1, batch=8)
    plan = estimate(cfg, arch, cluster(1))
    memory = plan.stages[0].memory
    n = arch.parameters()
    padded = memory.weights // 2
    assert n <= padded < n + 64 * 300  # every weight starts at a multiple of 64 elements
    assert (memory.gradients, memory.optimizer) == (4 * padded, 12 * n)
    assert not plan.links and plan.bubble == 0 and plan.micro_batches == 8
    tokens, peak = 8 * 4096, 989e12
    assert plan.stated_seconds == pytest.approx(tokens * arch.flops_per_token(4096) / (0.45 * peak))
    # With one GPU only the optimizer's pass over memory comes on top of the kernels.
    kernels = tokens * arch.flops_per_token(4096) / (0.6 * peak)
    assert plan.step_seconds == pytest.approx(kernels + 2 * 12 * n / 3.35e12)
    assert not plan.fits and "DOES NOT FIT" in sheet(plan)


def test_bubble_and_recomputation_take_time():
    cfg, arch = solar(vpp=1)
    plain = estimate(cfg, arch, cluster(64))
    assert plain.bubble == pytest.approx(1 / 33)  # 32 micro-batches, 2 stages
    chunked = estimate(replace(cfg, parallel=replace(cfg.parallel, vpp=4)), arch, cluster(64))
    assert chunked.bubble == pytest.approx(0.25 / 32.25)
    again = estimate(replace(cfg, train=replace(cfg.train, recompute="full")), arch, cluster(64))
    assert again.stages[0].seconds == pytest.approx(4 / 3 * plain.stages[0].seconds)
    assert again.stages[0].memory.activations < plain.stages[0].memory.activations / 10


def test_links_follow_the_order_of_ranks():
    cfg, arch = solar(tp=4, pp=2, vpp=1)
    links = {link.what: link for link in estimate(cfg, arch, cluster(8)).links}
    assert set(links) == {"tensor", "pipeline"} and {link.over for link in links.values()} == {"nvlink"}
    links = {link.what: link for link in estimate(cfg, arch, cluster(64)).links}
    assert (links["tensor"].over, links["pipeline"].over, links["gradients"].over) == (
        "nvlink",
        "network",
        "network",
    )
    # Two replicas in a node bring two adapters; fp32 gradients, 7/8 of them leave a rank.
    elements = max(stage.memory.gradients for stage in estimate(cfg, arch, cluster(64)).stages) // 4
    assert links["gradients"].sent == pytest.approx(4 * elements * 7 / 8)
    assert links["gradients"].seconds == pytest.approx(links["gradients"].sent / 100e9)


def test_search_finds_the_fastest_that_fits():
    cfg, arch = solar()
    found = search(cfg, arch, cluster(64))
    assert found.tried == len(list(candidates(cfg, arch, cluster(64))))
    assert all(plan.fits for plan in found.best)
    seconds = [plan.step_seconds for plan in found.best]
    assert seconds == sorted(seconds)
    for plan in found.best[:5]:
        check_run(plan.cfg, 64)
        assert not check_layout(arch, plan.cfg.parallel, 4096).texts
    # The configuration in the repository is within a hundredth of the best.
    assert estimate(cfg, arch, cluster(64)).step_seconds < 1.01 * seconds[0]
    nothing = search(cfg, arch, cluster(64, reserve=85 * 10**9))
    assert not nothing.best and nothing.smallest is not None


def test_warnings_name_the_head_and_the_embedding():
    cfg, arch = solar(pp=16, vpp=1, batch=32)
    text = "\n".join(warnings(estimate(cfg, arch, cluster(16))))
    assert "stage 15 (it has the language-model head)" in text
    assert "stage 0 (embedding, most micro-batches in flight)" in text
    assert "the pipeline stands still 32% of the time: 32 micro-batches for 16 stages" in text
    assert not warnings(estimate(*solar(), cluster(64)))


# ---------------------------------------------------------------------------------------------- command line

WORDS = ["--config", str(SOLAR / "2_pretrain.toml"), "--model.path", str(SOLAR / "model")]
WORDS += ["--model.layer_map", "dus:8"]


def test_table_and_json(capsys):
    assert main(["plan", *WORDS, "--gpus", "64"]) == 0
    table = capsys.readouterr().out
    assert "48 layers, 10.7B parameters (10,731,524,096)" in table and "neither row was measured" in table
    assert main(["plan", *WORDS, "--gpus", "64", "--json", "--mfu", "0.5"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 10_731_524_096 and plan["fits"] and plan["stated"]["mfu"] == 0.5
    assert [stage["memory"]["in_flight"] for stage in plan["stages"]] == [13, 11]
    assert plan["stated"]["gpu_hours"] == pytest.approx(plan["stated"]["days"] * 24 * 64)


def test_what_does_not_fit_is_an_exit_code(capsys):
    assert main(["plan", *WORDS, "--gpus", "8", "--gpu", "a100-40gb", "--search"]) == 0
    best = capsys.readouterr().out
    assert "as flags: --parallel.tp" in best
    assert main(["plan", *WORDS, "--gpus", "2"]) == 1
    assert "does not fit: the fullest rank needs" in capsys.readouterr().out
    assert main(["plan", *WORDS, "--gpus", "2", "--search"]) == 1
    assert "fits; the smallest:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "h1000"], "--gpu h1000: not a GPU that is known here; known: h100-pcie, h100"),
        (["--mfu", "1.5", "--gpus-per-node", "0"], "--mfu 1.5: must be above 0, at most 1"),
        (["--gpus", "63"], "world size 63 is not a multiple of"),
        (["--reserve", "much"], "--reserve = 'much' is not a size"),
        (["--parallel.tpp", "2"], "unknown flag --parallel.tpp; did you mean --parallel.tp?"),
    ],
)
def test_errors(words, expected, capsys):
    assert main(["plan", *WORDS, *words]) == 2
    assert expected in capsys.readouterr().err


def test_other_configurations_are_sent_to_their_verb(capsys):
    assert main(["plan", "--config", str(SOLAR / "1_upscale.toml")]) == 0
    assert "configures convert, which needs no plan; its settings are valid" in capsys.readouterr().out


def test_mistakes_of_other_configurations_show(tmp_path, capsys):
    (tmp_path / "x.toml").write_text('src = "a"\ndst = "b"\nlayermap = "dus:8"\n')
    assert main(["plan", "--config", str(tmp_path / "x.toml")]) == 2
    assert "unknown key layermap" in capsys.readouterr().err


def test_gpus_are_found_by_their_own_names():
    assert of_device("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert of_device("NVIDIA H100 PCIe") is GPUS["h100-pcie"]
    assert of_device("NVIDIA A100-SXM4-40GB") is GPUS["a100-40gb"]
    assert of_device("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert of_device("NVIDIA GeForce RTX 4090") is None
    assert find_gpu("H200") is GPUS["h200"]
