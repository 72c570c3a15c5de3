"""The verb as it is run: it learns, resumes, exports its template, gives the same on one and two ranks."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from solar_mega.__main__ import main
from solar_mega.data.chat import encode, load_template
from solar_mega.data.instructions import read_instructions
from solar_mega.data.rows import DatasetSpec
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.runtime.metrics import read_metrics
from tests.distributed import ROOT, run_ranks
from tests.train.conftest import write_model

INSTRUCTIONS = ROOT / "configs" / "tiny" / "data" / "instructions.jsonl"


@dataclass(frozen=True)
class Inputs:
    model: Path

    def words(self, out: Path, *more: str) -> list[str]:
        """The verb and its settings: 6 steps of 4 rows of 192 tokens; `more` last."""
        settings = f"""--model.path {self.model} --output.dir {out} --train.steps 6 --train.seq_length 192
            --train.global_batch_size 4 --train.precision fp32 --train.threads 1 --optimizer.lr 3e-3
            --schedule.kind constant"""
        data = [
            "--data.train",
            f"alpaca {INSTRUCTIONS} rows=0:120",
            "--data.valid",
            f"alpaca {INSTRUCTIONS} rows=300:",
        ]
        return ["sft", *settings.split(), *data, *more]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    model = tmp_path_factory.mktemp("inputs") / "model"
    train_sentencepiece([INSTRUCTIONS.read_text() * 4], 512, model)
    write_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    return Inputs(model)


def run(words: list[str]) -> str:
    """Standard output of the verb, which must succeed."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = main(words)
    assert code == 0, out.getvalue() + errors.getvalue()
    return out.getvalue()


def refused(words: list[str], capsys) -> str:
    assert main(words) == 2
    return capsys.readouterr().err


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def validations(out: Path) -> dict[int, float]:
    return {row["step"]: row["val_loss"] for row in read_metrics(out / "metrics.jsonl") if "val_loss" in row}


@pytest.fixture(scope="module")
def learned(inputs, tmp_path_factory):
    """(output directory, standard output) of three passes."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    more = ["--train.steps", "0", "--data.epochs", "3", "--train.eval_interval", "5"]
    return out, run(inputs.words(out, *more, "--output.export_best", "true"))


def test_it_lowers_the_loss_of_held_out_responses(learned) -> None:
    seen = list(validations(learned[0]).values())
    assert seen[-1] < 0.6 * seen[0]


def test_the_report_says_what_became_of_the_rows(learned) -> None:
    out, said = learned
    assert "120 conversations in" in said and "alpaca instructions.jsonl: 120 of 120 rows" in said
    assert "60 conversations" in said and "of them in the loss" in said
    rows = json.loads((out / "hf" / "lineage.json").read_text())
    assert '"template": "alpaca"' in json.dumps(rows) and '"conversations": 120' in json.dumps(rows)


def test_the_best_is_kept(learned) -> None:
    out, said = learned
    seen = {step: loss for step, loss in validations(out).items() if step}
    best = min(seen, key=seen.get)
    assert f"at step {best}: {out}/best" in said
    assert f'"val_loss": {seen[best]!r}' in (out / "best" / "lineage.json").read_text()


def test_the_exported_tokenizer_gives_the_training_tokens(learned, inputs) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, tokenizer = learned[0], load_tokenizer(inputs.model)
    template = load_template("alpaca", tokenizer)
    theirs = AutoTokenizer.from_pretrained(out / "hf")
    instructions, _ = read_instructions(DatasetSpec("alpaca", str(INSTRUCTIONS), rows=(0, 20)), seed=0)
    for instruction in instructions:
        encoded = encode(instruction.messages, template, tokenizer)
        got = theirs.apply_chat_template(
            template.as_dicts(instruction.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        assert got["input_ids"] == encoded.ids.tolist()
        assert got["assistant_masks"] == encoded.loss.astype(int).tolist()
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert model.generation_config.eos_token_id == tokenizer.eos_id
    prompt = template.text(instructions[0].messages[:1], generation_prompt=True)
    ids = theirs(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model.generate(ids, max_new_tokens=4).shape[0] == 1


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(inputs, tmp_path, capsys) -> None:
    """Noise on the embeddings included."""
    noisy = ("--data.neftune_alpha", "5")
    run(inputs.words(tmp_path / "whole", *noisy))
    run(inputs.words(tmp_path / "halves", *noisy, "--train.steps", "3"))
    said = run(inputs.words(tmp_path / "halves", *noisy))
    assert "at step 3" in said
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    changed = inputs.words(tmp_path / "halves", "--train.steps", "7", "--data.template", "solar")
    assert "it was trained on other rows" in refused(changed, capsys)
    run(inputs.words(tmp_path / "quiet"))
    assert losses(tmp_path / "quiet")[0] != losses(tmp_path / "whole")[0]
    assert validations(tmp_path / "quiet")[0] == validations(tmp_path / "whole")[0]


def test_packed_and_apart_validate_alike(inputs, tmp_path) -> None:
    run(inputs.words(tmp_path / "packed", "--train.steps", "1"))
    run(inputs.words(tmp_path / "apart", "--train.steps", "1", "--data.packing", "false"))
    packed, apart = (validations(tmp_path / name)[0] for name in ("packed", "apart"))
    assert packed == pytest.approx(apart, rel=1e-6)


def _two_ranks(words: list[str], layouts: dict[str, str]) -> None:
    for name, layout in layouts.items():
        at = words.index("--output.dir") + 1
        assert main([*words[:at], str(Path(words[at]) / name), *words[at + 1 :], *layout.split()]) == 0


def test_two_ranks_give_what_one_gives(inputs, tmp_path) -> None:
    """fp32, whose sums go in another order; the noise is that of the row, not of the rank."""
    more = ("--train.steps", "3", "--data.neftune_alpha", "5")
    run(inputs.words(tmp_path / "one", *more))
    layouts = {
        "pp": "--parallel.pp 2",
        "dp": "--parallel.dp 2 --parallel.overlap_grad_reduce true --parallel.overlap_param_gather true "
        "--parallel.bucket_size 1",
        "tp": "--parallel.tp 2 --parallel.sequence_parallel true --train.recompute full",
    }
    run_ranks(_two_ranks, 2, inputs.words(tmp_path, *more), layouts)
    for name in layouts:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), name
        assert validations(tmp_path / name) == pytest.approx(validations(tmp_path / "one"), rel=1e-5), name


def test_dry_run_and_preview_write_nothing(inputs, tmp_path) -> None:
    out = tmp_path / "out"
    said = run([*inputs.words(out, "--train.steps", "0"), "--dry-run"])
    assert "conversations in" in said and "training" in said
    shown = run([*inputs.words(out), "--preview", "1"])
    assert "### Response:⟦" in shown and "</s>⟧" in shown
    assert not out.exists()


def test_bad_settings_are_reported_at_once(inputs, tmp_path, capsys) -> None:
    more = ["--train.micro_batch_size", "2", "--data.epochs", "-1", "--schedule.warmup_fraction", "1"]
    said = refused(inputs.words(tmp_path / "out", *more), capsys)
    for key in ("train.micro_batch_size = 2", "data.epochs = -1.0", "schedule.warmup_fraction = 1.0"):
        assert key in said


def test_strict_mode_stops_and_lists(inputs, tmp_path, capsys) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": ""}\n{"instruction": "d"}\n'
    )
    words = inputs.words(tmp_path / "out", "--data.train", f"alpaca {bad}", "--data.strict", "true")
    said = refused(words, capsys)
    assert f"1 x an empty response: {bad}:2" in said and f"1 x no field output: {bad}:3" in said


def test_another_model_s_tokenizer_is_refused(inputs, tmp_path, capsys) -> None:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    train_sentencepiece([Path(json.__file__).read_text()], 400, tmp_path / "other")
    said = refused(inputs.words(tmp_path / "out", "--data.tokenizer", str(tmp_path / "other")), capsys)
    assert "is not the model's: token" in said
