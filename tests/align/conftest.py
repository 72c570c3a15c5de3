"""A tiny model with its tokenizer and preference pairs with something to learn, as the verbs take them."""

import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.conftest import write_model

COLOURS = ("red", "green", "blue", "black", "white", "yellow", "grey", "brown")
SIZES = ("small", "large", "round", "old", "new", "fast", "slow", "warm")
WORDS = (*COLOURS, *SIZES)


@dataclass(frozen=True)
class PairInputs:
    model: Path
    """Hugging Face directory: 4 layers, fp32, with a tokenizer."""
    first: Path
    second: Path
    """Preference pairs, 24 each: chosen responses repeat the prompt's words, rejected ones reverse them."""
    valid: Path
    """8 more."""

    def words(self, out: Path, *more: str) -> list[str]:
        """The verb and its settings: one pass over 24 pairs in steps of 8; `more` last."""
        settings = f"""--model.path {self.model} --output.dir {out} --data.template solar --data.max_length 96
            --data.max_prompt_length 48 --train.seq_length 256 --train.global_batch_size 8
            --train.precision fp32 --train.threads 1 --optimizer.lr 1e-3 --optimizer.clip_grad 0
            --schedule.kind constant"""
        return ["dpo", *settings.split(), *more]

    def step(self, out: Path, *more: str) -> list[str]:
        data = ("--data.train", f"plain {self.first}", "--data.valid", f"plain {self.valid}")
        return self.words(out, *data, *more)


def write_pairs(file: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with file.open("w") as stream:
        for _ in range(count):
            words = draw.sample(WORDS, draw.randint(2, 9))
            pair = {"prompt": f"Say {' '.join(words)}.", "chosen": " ".join(words)}
            stream.write(json.dumps({**pair, "rejected": " ".join(reversed(words))}) + "\n")
    return file


def make_inputs(root: Path) -> PairInputs:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / "argparse.py").read_text(), " ".join(WORDS * 20)]
    train_sentencepiece(texts, 512, root / "model")
    write_model(root / "model")
    config = json.loads((root / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (root / "model" / "config.json").write_text(json.dumps(config))
    files = (write_pairs(root / f"{seed}.jsonl", count, seed) for seed, count in enumerate((24, 24, 8)))
    return PairInputs(root / "model", *files)


@pytest.fixture(scope="session")
def pair_inputs(tmp_path_factory) -> PairInputs:
    return make_inputs(tmp_path_factory.mktemp("pairs"))
