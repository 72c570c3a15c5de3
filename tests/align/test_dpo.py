"""The verb on every layout, packed and not; the reference cache; resume.

Tolerance of layouts. Losses are means of some tens of fp32 log-probs near 6 times beta = 0.1, so rounding of
the forward pass moves them by 1e-6 at most; steps of Adam carry that on (see tests/train/test_parallel). 1e-5
is the bound asked for; seen: below 1e-6.
"""

import contextlib
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.align import reference
from solar_mega.align.dpo import prepare, reference_accuracy
from solar_mega.align.pair_batches import Order, RowPlan
from solar_mega.align.pairs import read_data
from solar_mega.align.reference import PIECE, ReferenceCache, ReferenceKey, compute
from solar_mega.config.command_line import RunOptions, parse_run
from solar_mega.config.dpo import DPOConfig
from solar_mega.errors import UserError
from solar_mega.runtime.metrics import read_metrics
from solar_mega.train.report import MEASURED
from tests.distributed import run_ranks
from tests.train.tiny import one_rank

RPO = ("--loss.rpo_alpha", "0.2")
OVERLAP = ("--parallel.overlap_grad_reduce", "--parallel.overlap_param_gather", "--parallel.bucket_size", "1")
ONE_RANK = {
    "tp1": (),
    "unpacked": ("--data.packing", "false"),
    "all-logits": ("--kernels.loss_logits_mib", "0"),
    "rpo": RPO,
    "rpo-unpacked": (*RPO, "--data.packing", "false"),
}
TWO_RANKS = {
    "tp2": ("--parallel.tp", "2", "--parallel.sequence_parallel", "true"),
    "pp2": ("--parallel.pp", "2"),
    "pp2-vpp2": ("--parallel.pp", "2", "--parallel.vpp", "2"),
    "dp2": (),
    "rpo-dp2": (*RPO, *OVERLAP),
}


def rows_of(run: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(run / "metrics.jsonl")
    ]


def config(words: list[str]) -> DPOConfig:
    return parse_run(RunOptions, DPOConfig, words[1:], "dpo")[1]


def _verbs(commands: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    results = {}
    for name, words in commands.items():
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            results[name] = main(words), errors.getvalue()
    return results


@pytest.fixture(scope="module")
def runs(pair_inputs, tmp_path_factory):
    """Every case once: its directory."""
    root, threads = tmp_path_factory.mktemp("dpo"), torch.get_num_threads()
    words = {name: pair_inputs.step(root / name, *case) for name, case in {**ONE_RANK, **TWO_RANKS}.items()}
    words["tp1"] += ["--checkpoint.interval", "1", "--checkpoint.keep", "9"]
    done = _verbs({name: words[name] for name in ONE_RANK})
    torch.set_num_threads(threads)
    for rank in run_ranks(_verbs, 2, {name: words[name] for name in TWO_RANKS}):
        done |= rank
    failed = {name: error for name, (code, error) in done.items() if code}
    assert not failed, failed
    return root


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_every_layout_and_packing_takes_the_same_steps(runs, name):
    mine = rows_of(runs / name)
    expected = rows_of(runs / ("rpo" if name.startswith("rpo") else "tp1"))
    assert [row["step"] for row in mine] == [0, 1, 2, 3, 3]
    for row, reference_row in zip(mine, expected, strict=True):
        assert row.keys() == reference_row.keys()
        even = abs(reference_row.get("rewards/margins", reference_row.get("val_rewards/margins"))) < 1e-6
        for key, value in reference_row.items():
            if even and key.endswith(("accuracies", "longer_favoured")):
                continue  # signs of rounding errors
            # Log-probs are sums near -150, everything else is of order 1.
            assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, row["step"], key)


def test_starts_at_ln_2_and_learns(runs):
    rows = rows_of(runs / "tp1")
    start, first, last = rows[0], rows[1], rows[-1]
    assert start["val_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(start["val_rewards/margins"]) < 1e-6
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["gradient_weight"] == pytest.approx(0.5, abs=1e-6)
    assert rows[3]["loss"] < first["loss"] and rows[3]["rewards/margins"] > 0
    assert last["val_kl"] != 0 and start["val_kl"] == pytest.approx(0, abs=1e-6)
    assert abs(first["length_difference"]) < 1  # reversed words have as many tokens, or nearly


def test_export_says_where_it_comes_from(runs, pair_inputs):
    lineage = json.loads((runs / "tp1" / "hf" / "lineage.json").read_text())
    assert lineage["made_by"] == "dpo"
    assert lineage["parents"][0]["path"] == str(pair_inputs.model)
    assert len(lineage["config"]["data_hash"]) == 64


def test_a_resumed_run_is_the_same_run(runs, pair_inputs, tmp_path):
    """From step 2 with the cache gone: the reference is the first model, not the one in the checkpoint."""
    copy = tmp_path / "resumed"
    shutil.copytree(runs / "tp1", copy, ignore=shutil.ignore_patterns("hf", "reference", "step-00000003"))
    (copy / "checkpoints" / "latest").write_text("step-00000002\n")
    assert main(pair_inputs.step(copy, "--checkpoint.interval", "1", "--checkpoint.keep", "9")) == 0
    assert rows_of(copy) == rows_of(runs / "tp1")
    files = [(run / "hf" / "model.safetensors").read_bytes() for run in (copy, runs / "tp1")]
    assert files[0] == files[1]


def test_a_run_is_not_resumed_on_other_pairs(runs, pair_inputs, capsys):
    words = pair_inputs.step(runs / "unpacked", "--data.max_length", "40", "--data.max_prompt_length", "20")
    assert main(words) == 2
    assert "it was trained on other pairs" in capsys.readouterr().err


# --- the reference cache


@pytest.fixture
def model(pair_inputs, tmp_path):
    shutil.copytree(pair_inputs.model, tmp_path / "model")
    return replace(pair_inputs, model=tmp_path / "model", first=shutil.copy(pair_inputs.first, tmp_path))


def keys(root: Path) -> set[str]:
    return {path.parent.name for path in (root / "reference").glob("*/key.json")}


def test_cache_knows_model_data_and_template(model, tmp_path):
    """One byte of the weights, one letter of the data or another template: computed anew. Else not."""
    template = tmp_path / "changed.jinja"
    from solar_mega.data.templates import SOLAR

    template.write_text(SOLAR.replace("### User", "### Human"))

    def look(*more: str) -> tuple[float, set[str]]:
        return reference_accuracy(config(model.step(tmp_path / "run", *more))), keys(tmp_path / "run")

    first, seen = look()
    again, same = look()
    assert (first, len(seen)) == (again, 2) and same == seen  # training and held-out pairs
    _, templated = look("--data.template", str(template))
    assert len(templated - seen) == 2
    text = Path(model.first).read_text()
    Path(model.first).write_text(text.replace("small", "smell", 1))
    _, changed = look()
    assert len(changed - templated) == 1  # the held-out pairs are as they were
    weights = next(model.model.glob("model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _, reweighted = look()
    assert len(reweighted - changed) == 2


def _killed_after_one_piece(words: list[str]) -> None:
    reference.PIECE = 8
    write = ReferenceCache.write

    def once(self, piece, values):
        write(self, piece, values)
        os.kill(os.getpid(), signal.SIGKILL)

    ReferenceCache.write = once
    reference_accuracy(config(words))


def test_a_killed_pass_goes_on_where_it_was(pair_inputs, tmp_path, monkeypatch):
    words = pair_inputs.words(tmp_path / "run", "--data.train", f"plain {pair_inputs.first}")
    whole = pair_inputs.words(tmp_path / "whole", "--data.train", f"plain {pair_inputs.first}")
    monkeypatch.setattr(reference, "PIECE", 8)
    assert run_ranks(_killed_after_one_piece, 1, words, check=False).returncode != 0
    (directory,) = (tmp_path / "run" / "reference").iterdir()
    assert [file.name for file in sorted(directory.glob("*.npy"))] == ["00000000.npy"]
    (directory / "00000008.npy").write_bytes((directory / "00000000.npy").read_bytes()[:100])  # torn
    kept = (directory / "00000000.npy").stat().st_mtime_ns
    accuracies = [reference_accuracy(config(words)), reference_accuracy(config(whole))]
    assert accuracies[0] == accuracies[1]
    assert (directory / "00000000.npy").stat().st_mtime_ns == kept
    for piece in ("00000000.npy", "00000008.npy", "00000016.npy"):
        values = [np.load(tmp_path / run / "reference" / directory.name / piece) for run in ("run", "whole")]
        np.testing.assert_allclose(*values, rtol=1e-7)


def test_cached_is_live(runs, pair_inputs):
    """Rows of their own instead of packed ones, so that nothing but the sums can agree."""
    cfg = config(pair_inputs.step(runs / "tp1"))
    prepared = prepare(cfg, 1)
    data = read_data(cfg, prepared.template, prepared.model.tokenizer)
    (directory,) = (
        path.parent
        for path in (runs / "tp1" / "reference").glob("*/key.json")
        if json.loads(path.read_text())["data"] == data.train.fingerprint
    )
    cached = np.load(directory / "00000000.npy")
    with one_rank():
        from solar_mega.model.builder import build_for_training
        from solar_mega.train.stage import load_initial_weights

        chunks = build_for_training(prepared.model.arch, cfg.parallel, cfg.train, cfg.kernels)
        load_initial_weights(cfg, prepared.model, chunks)
        live = compute(chunks, data.train.pairs, range(24), RowPlan(256, packing=False, dp=1, dp_rank=0))
    assert cached.shape == (24, 2) and np.isfinite(cached).all()
    np.testing.assert_allclose(cached, live, rtol=1e-6)


def test_a_file_of_another_size_is_not_used(tmp_path):
    cache = ReferenceCache(tmp_path, ReferenceKey("c", "d", "t", "fp32", ""), PIECE + 3)
    first, second = cache.pieces()
    cache.write(first, np.zeros((PIECE, 2)))
    assert cache.missing() == [second]
    cache.write(second, np.zeros((2, 2)))
    assert cache.missing() == [second]
    with pytest.raises(UserError, match="disappeared"):
        cache.load()


def test_order_is_a_shuffle_per_pass():
    order = Order(pairs=10, batch=4, seed=3)
    steps = [order.of_step(step) for step in range(1, 6)]
    seen = [number for step in steps for number in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] != list(range(10))


# --- bad input


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        (
            ("--train.seq_length", "100"),
            ["train.seq_length = 100: must be at least 2 * data.max_length = 192"],
        ),
        (("--data.max_prompt_length", "96"), ["data.max_prompt_length = 96: must be at least 1 and below"]),
        (("--train.micro_batch_size", "2"), ["train.micro_batch_size = 2: must be 1"]),
        (("--loss.beta", "0", "--data.epochs", "0"), ["loss.beta = 0.0", "data.epochs = 0.0"]),
        (("--loss.variant", "ipo", "--loss.label_smoothing", "0.1"), ['loss.variant = "ipo" has none']),
        (("--ladder.chunks", "plain x.jsonl"), ["given: both"]),
        (("--data.train", "odd x.jsonl", "plain"), ["'odd x.jsonl' is not a data set", "'plain' is not"]),
        (("--data.train", "plain gone.jsonl"), ["gone.jsonl: no such file"]),
        (("--data.template", "gone.jinja"), ["gone.jinja"]),
    ],
)
def test_bad_settings_are_one_screen(pair_inputs, tmp_path, capsys, more, texts):
    assert main(pair_inputs.step(tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_pairs_are_reported_and_strict_mode_stops(pair_inputs, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    equal = {"prompt": "p", "chosen": "same", "rejected": "same "}
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, equal, {"prompt": "p", "chosen": "a"}]
    window = {"prompt": "word " * 200, "chosen": "yes " * 80, "rejected": "no " * 80}
    spelled = {"prompt": "p </s>", "chosen": "a", "rejected": "b"}
    bad.write_text("".join(json.dumps(row) + "\n" for row in [*rows, window, spelled]))
    words = pair_inputs.words(tmp_path / "run", "--data.train", f"plain {bad}", "--dry-run")
    assert main(words) == 0
    report = capsys.readouterr().out
    for text in (
        "2 of 5 rows",
        "1 dropped: chosen and rejected are the same",
        f"1 dropped: no field rejected ({bad}:3",
        "special token </s>",
        "cut to length: 1 prompts, 2 responses",
    ):
        assert text in report, report
    preview = [*words[:-1], "--preview", "2"]
    assert main(preview) == 0
    shown = capsys.readouterr().out
    assert f"no field rejected ({bad}:3" in shown and "⟦a</s>⟧" in shown and "⟦b</s>⟧" in shown
    assert "--- prompt: 48 of " in shown and "⟧✂ " in shown
    assert not (tmp_path / "run").exists()
    assert main([*words, "--data.strict", "true"]) == 2
    error = capsys.readouterr().err
    assert "data.strict = true" in error and "no field rejected" in error
