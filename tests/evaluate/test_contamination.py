"""On a model trained on the texts the share is high, on one that never saw them low; the seed decides the
numbers and the layout does not."""

from pathlib import Path

import pytest
import torch

from solar_mega.errors import UserError
from solar_mega.evaluate.contamination import min_k, render
from solar_mega.evaluate.contamination_command import ContaminationOptions, run
from solar_mega.evaluate.model import Score

TEXTS = 16


@pytest.fixture(scope="module")
def texts(task_files, tmp_path_factory) -> Path:
    """The first GSM8K-like records, all a test file there is."""
    folder = tmp_path_factory.mktemp("contamination")
    (folder / "gsm8k").mkdir()
    lines = (task_files / "gsm8k" / "test.jsonl").read_text().splitlines(True)[:TEXTS]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(model_dir, texts, tmp_path_factory) -> Path:
    """The tiny model after learning those records by heart."""
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    records = map(json.loads, (texts / "gsm8k" / "test.jsonl").read_text().splitlines())
    rows = [tokenizer.encode(render("gsm8k", r), add_special_tokens=False)[:48] for r in records]
    batch = torch.tensor([[1, *row] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    directory = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_contamination_is_told_from_none(model_dir, trained, texts):
    def share(model: Path, seed: int):
        (result,) = run(
            ContaminationOptions(
                model=model,
                reference=model_dir,
                data=texts,
                max_tokens=48,
                neighbours=12,
                seed=seed,
            )
        )
        return result

    learned = share(trained, 0)
    assert learned.texts == TEXTS and learned.share > 0.9
    assert learned.min_k_target > learned.min_k_reference + 1
    assert share(trained, 0) == learned
    # The reference itself: real text is no likelier to it than its own samples.
    assert share(model_dir, 1).share < 0.4


def test_min_k_is_the_mean_of_the_least_likely():
    score = Score((-1.0, -5.0, -0.5, -3.0, -0.1), False)
    assert min_k(score, 0.4) == pytest.approx(-4.0)
    assert min_k(score, 0.01) == -5.0


def test_bad_settings_are_listed_together(tmp_path):
    with pytest.raises(UserError) as caught:
        run(ContaminationOptions(rewritten=1.5, neighbours=0, temperature=0))
    text = str(caught.value)
    for expected in ("no model given", "--reference is missing", "--data", "--rewritten", "--neighbours"):
        assert expected in text
