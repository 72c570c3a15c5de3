"""The quickstart's report from known metrics, beside a small grown run that was really trained."""

import json
import shutil

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.errors import UserError
from solar_mega.quickstart.plot import plot
from solar_mega.quickstart.runs import Curve, read_runs

VALIDATION = {  # run: validation losses at 0, 1000, 2000, ... tokens
    "base": [6.0, 4.0, 3.0],
    "grown": [3.5, 3.1, 3.0, 2.9],
    "stack": [3.6, 3.3, 3.2, 3.1],
    "continued": [3.0, 2.98, 2.97, 2.96],
    "scratch": [6.1, 5.0, 4.5, 4.0],
}
FLOPS_PER_TOKEN = {"base": 10.0, "grown": 15.0, "stack": 20.0, "continued": 10.0, "scratch": 15.0}


@pytest.fixture(scope="module")
def root(inputs, tmp_path_factory):
    """A grown model trained for one step on one process; every run's metrics replaced by the ones above."""
    root, threads = tmp_path_factory.mktemp("quickstart"), torch.get_num_threads()
    one_step = "--model.layer_map dus:1 --train.steps 1 --schedule.warmup_steps 0"
    assert main(inputs.words(root / "grown", one_step)) == 0
    torch.set_num_threads(threads)
    for name, losses in VALIDATION.items():
        if name != "grown":
            (root / name / "hf").mkdir(parents=True)
            shutil.copy(inputs.model / "config.json", root / name / "hf")
        rows = []
        for i, loss in enumerate(losses):
            place = {"step": i, "tokens": 1000 * i, "flops": 1000 * i * FLOPS_PER_TOKEN[name]}
            if i:
                rows.append({**place, "loss": loss + 0.1, "tokens_per_second": 100.0 * i})
            rows.append({**place, "val_loss": loss})
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_report_numbers(root, capsys):
    assert main(["quickstart", "report", "--root", str(root), "--seconds", "12.34"]) == 0
    report = json.loads((root / "report.json").read_text())
    diff = report.pop("logits_max_abs_diff")
    assert 0 <= diff < 1e-4
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    outside = 2 * 512 * 32 + 32
    assert report == {
        "base_val_loss": 3.0,
        "grown_val_loss_step0": 3.5,
        "grown_val_loss_final": 2.9,
        "stack_val_loss_step0": 3.6,
        "stack_val_loss_final": 3.1,
        "scratch_val_loss_final": 4.0,
        "base_continued_val_loss_final": 2.96,
        "tokens_base": 2000,
        "tokens_continued": 3000,
        "tokens_to_recover_base": 2000,
        "stack_tokens_to_recover_base": None,
        "flops_base": 20000.0,
        "flops_grown": 45000.0,
        "flops_stack": 60000.0,
        "flops_continued": 30000.0,
        "flops_scratch": 45000.0,
        "parameters_base": 4 * layer + outside,
        "parameters_grown": 6 * layer + outside,
        "seconds": 12.3,
        "tokens_per_second": 200.0,
    }
    picture = (root / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    output = capsys.readouterr().out
    for part in ("3.500", "2.900", "2K tokens", "at once", "logits differ", "loss.png"):
        assert part in output


def test_a_run_that_never_recovers_is_drawn_too(root, tmp_path):
    runs = read_runs(root)
    never = Curve(runs.grown.tokens, runs.grown.flops, (3.5, 3.4, 3.3, 3.2), 1.0)
    assert never.tokens_to_reach(runs.base.end) is None
    plot(type(runs)(**{**vars(runs), "grown": never}), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 20_000


def test_unfinished_runs_are_named(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "stack" / "hf")
    shutil.rmtree(copy / "scratch")
    with pytest.raises(UserError, match="no finished run stack, scratch"):
        read_runs(copy)
