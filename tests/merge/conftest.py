"""Small models to merge: one ancestor and two that moved away from it, each in its own way."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from solar_mega.merge import chunks

VOCABULARY, HIDDEN = 2048, 96


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """So small that the embedding has three, in two windows."""
    monkeypatch.setattr(chunks, "CHUNK", 1 << 16)
    monkeypatch.setattr(chunks, "_WINDOW", 2 << 16)


def make_model(
    path: Path, seed: int, base: Path | None = None, shift: float = 0.02, dtype=torch.bfloat16, **config
) -> Path:
    """A Llama of 4 layers in a few shards; with `base`, that model plus noise of size `shift`."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=HIDDEN,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(seed)
    if base is None:
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
        start = 0.05
    else:
        model, start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), shift
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * start)
    model.to(dtype).save_pretrained(path, max_shard_size="300KB")
    tokens = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = {"model": {"type": "BPE", "vocab": tokens, "merges": []}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> dict[str, Path]:
    """base, and a and b trained from it; only to be read."""
    place = tmp_path_factory.mktemp("family")
    base = make_model(place / "base", 0)
    return {
        "base": base,
        "a": make_model(place / "a", 1, base),
        "b": make_model(place / "b", 2, base, shift=0.03),
    }


@pytest.fixture(scope="session")
def wide_family(tmp_path_factory) -> dict[str, Path]:
    """The same in fp32, where no two differences are equal."""
    place = tmp_path_factory.mktemp("wide")
    base = make_model(place / "base", 0, dtype=torch.float32)
    return {
        "base": base,
        "a": make_model(place / "a", 1, base, dtype=torch.float32),
        "b": make_model(place / "b", 2, base, shift=0.03, dtype=torch.float32),
    }


@pytest.fixture
def copy_of(family, tmp_path):
    """A model of the family that a test may damage."""
    return lambda name: shutil.copytree(family[name], tmp_path / f"copy-{name}")
