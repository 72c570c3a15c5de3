"""A tiny pretrained model with its tokenizer, and corpora made with it, as the verb takes them."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.tiny import CONFIG

VOCABULARY = 512


@dataclass(frozen=True)
class Inputs:
    model: Path
    """Hugging Face directory: 4 layers, fp32, in several shards, with a tokenizer."""
    train: Path
    valid: Path

    def words(self, out: Path, *more: str) -> list[str]:
        """The verb and its settings: 6 steps of 4 samples of 32 tokens, validated every 3; `more` last."""
        settings = f"""--model.path {self.model} --data.train {self.train} --data.valid {self.valid}
            --output.dir {out} --train.steps 6 --train.seq_length 32 --train.global_batch_size 4
            --train.micro_batch_size 1 --train.precision fp32 --train.eval_interval 3 --train.eval_samples 4
            --train.threads 1 --optimizer.lr 1e-3 --schedule.warmup_steps 2"""
        return ["pretrain", *settings.split(), *" ".join(more).split()]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), Path(sysconfig.get_paths()["stdlib"]))


def make_inputs(root: Path, library: Path) -> Inputs:
    """Into the directory `root`, from Python's own sources in `library`."""
    root.mkdir(exist_ok=True)
    texts = {
        "train": (library / "argparse.py").read_text(),
        "valid": (library / "shlex.py").read_text(),
    }
    from solar_mega.data.tokenize import tokenize
    from solar_mega.data.train_tokenizer import train_sentencepiece

    tokenizer = train_sentencepiece(texts.values(), VOCABULARY, root / "model")
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
        tokenize([str(root / f"{name}.txt")], tokenizer, root / name, workers=1)
    write_model(root / "model")
    return Inputs(root / "model", root / "train", root / "valid")


def write_model(directory: Path) -> None:
    """config.json and random weights, norms included, go beside what is in `directory`."""
    import torch

    from solar_mega.artifact.hf import write_config
    from solar_mega.artifact.safetensors_writer import ShardedWriter
    from solar_mega.checkpoint.names import hf_shapes
    from solar_mega.checkpoint.random_weights import RandomWeights
    from solar_mega.model.architecture import Architecture

    config = {**CONFIG, "vocab_size": VOCABULARY, "dtype": "float32"}
    arch = Architecture.from_hf(config)
    weights, generator = RandomWeights(arch, seed=11), torch.Generator().manual_seed(3)
    write_config(directory, config)
    with ShardedWriter(directory, 100_000) as writer:
        writer.plan([(name, "F32", shape) for name, shape in hf_shapes(arch).items()])
        for name, shape in hf_shapes(arch).items():
            weight = weights.read_rows(name, 0, shape[0])
            writer.write(name, weight.uniform_(0.5, 1.5, generator=generator) if len(shape) == 1 else weight)
