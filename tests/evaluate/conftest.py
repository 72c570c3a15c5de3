"""A tiny decoder with a tokenizer, and the self-made task files."""

import sysconfig
from pathlib import Path

import pytest

VOCABULARY = 512


def make_model(directory: Path, seed: int = 5, **changes) -> Path:
    """Random weights beside the tokenizer in `directory`, as transformers writes them."""
    import torch
    import transformers

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,  # large enough that a wrong mask or position shows
        sliding_window=40,
        eos_token_id=2,
        bos_token_id=1,
    )
    config = transformers.MistralConfig(**{**settings, **changes})
    transformers.MistralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    from solar_mega.data.train_tokenizer import train_sentencepiece

    directory = tmp_path_factory.mktemp("evaluate") / "tiny"
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / name).read_text() for name in ("argparse.py", "shlex.py")]
    train_sentencepiece(texts, VOCABULARY, directory)
    return make_model(directory)


@pytest.fixture(scope="session")
def task_files(tmp_path_factory) -> Path:
    from solar_mega.evaluate.tiny_tasks import write_tiny_tasks

    folder = tmp_path_factory.mktemp("tasks")
    write_tiny_tasks(folder)
    return folder
