"""A small real checkpoint, made by transformers."""

import shutil

import pytest
import torch


def make_llama(path, layers=6, dtype=torch.float32, max_shard_size="60KB", seed=0, **config):
    """Saves a Llama with random weights (norms too, so that layers cannot be confused) in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**sizes, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "special_tokens_map.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def pristine_llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("pristine") / "llama")


@pytest.fixture
def llama(pristine_llama, tmp_path):
    """6 layers, fp32, several shards; a copy of its own for each test."""
    return shutil.copytree(pristine_llama, tmp_path / "llama")
