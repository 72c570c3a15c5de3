"""`synthesize` with a model of its own: a small Llama that has learnt by heart what it will be asked."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.data import math_prompts as prompts
from solar_mega.data.chat import Message, encode, load_template, stop_tokens, write_template
from solar_mega.data.generators import CUT_OFF, Request, Sampling
from solar_mega.data.local_generators import TransformersGenerator
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.data.train_tokenizer import train_sentencepiece

pytest.importorskip("math_verify")

SEEDS = [
    (
        "What are five apples and 4 more?",
        "5 + 4 = \\boxed{9}.",
        "Five apples, then 4: how many?",
        "In all \\boxed{9}.",
    ),
    ("Halve 1.", "It is \\boxed{\\frac{1}{2}}.", "What is one half of 1?", "One of two parts: \\boxed{0.5}."),
    ("What is 10 minus 3?", "\\boxed{7}.", "Take 3 from 10.", "That leaves \\boxed{6}."),
]
"""Problem, solution, and what the model says: the problem in other words, and its answer."""


@dataclass(frozen=True)
class Learnt:
    directory: Path
    answers: dict[str, str]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Learnt:
    answers = {}
    for problem, _, question, answer in SEEDS:
        answers |= {prompts.rephrase(problem): question, prompts.solve(question): answer}
    directory = tmp_path_factory.mktemp("math") / "model"
    train_sentencepiece([*answers, *answers.values()] * 3, 700, directory)
    tokenizer = load_tokenizer(directory)
    template = load_template("solar", tokenizer)
    write_template(directory, template, tokenizer)
    talks = [
        encode([Message("user", prompt), Message("assistant", text)], template, tokenizer)
        for prompt, text in answers.items()
    ]
    _learn(talks, tokenizer, directory)
    return Learnt(directory, answers)


def _learn(talks, tokenizer, directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = LlamaForCausalLM(config)
    width = max(map(len, talks))
    ids, labels = torch.zeros(len(talks), width, dtype=torch.long), torch.full((len(talks), width), -100)
    for row, talk in enumerate(talks):
        ids[row, : len(talk)] = torch.from_numpy(talk.ids)
        labels[row, : len(talk)] = torch.where(torch.from_numpy(talk.loss), torch.from_numpy(talk.ids), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.02
    model.save_pretrained(directory)


def words(learnt: Learnt, seeds: Path, out: Path, *more: str) -> list[str]:
    given = ("--backend", "transformers", "--model", str(learnt.directory), "--max-tokens", "40")
    return ["synthesize", str(seeds), "--output", str(out), *given, *more]


@pytest.fixture
def seeds(tmp_path) -> Path:
    file = tmp_path / "math.jsonl"
    rows = ({"problem": problem, "solution": solution} for problem, solution, *_ in SEEDS)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_both_sets_come_from_a_model(learnt, seeds, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(words(learnt, seeds, out, "--temperature", "0", "--concurrency", "2")) == 0
    right = SEEDS[:2]  # of the third the model has learnt a wrong answer
    rows = read(out / "instruct.jsonl")
    assert [(row["prompt"], row["response"]) for row in rows] == [seed[2:] for seed in right]
    pairs = read(out / "alignment.jsonl")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(seed[3], seed[1]) for seed in right]
    report = json.loads((out / "report.json").read_text())
    assert report["requests"] == 6 and report["dropped"] == {"rephrased: another answer than the seed's": 1}
    tokenizer = load_tokenizer(learnt.directory)
    said = sum(len(tokenizer.encode(text)) + 1 for text in learnt.answers.values())
    assert report["completion_tokens"] == said
    assert "2 rephrased kept" in capsys.readouterr().out


def test_prompts_of_other_lengths_in_a_batch_change_nothing(learnt) -> None:
    requests = [Request(prompt) for prompt in learnt.answers]
    sampling = Sampling(temperature=0, max_tokens=40)
    for batch_size in (1, 4, 6):
        said = list(TransformersGenerator(learnt.directory, sampling, batch_size).complete(requests))
        assert {one.request.prompt: one.text for one in said} == learnt.answers
        assert all(one.error is None and one.prompt_tokens > 20 for one in said)


def test_what_does_not_fit_is_counted_and_the_rest_goes_on(learnt) -> None:
    first = next(iter(learnt.answers))
    generator = TransformersGenerator(learnt.directory, Sampling(temperature=0, max_tokens=2), 2)
    cut, refused = sorted(generator.complete([Request(first), Request("word " * 300)]), key=lambda c: c.error)
    assert (cut.error, cut.completion_tokens) == (CUT_OFF, 2)
    assert refused.error == "the question fills the model's context" and refused.prompt_tokens > 256


def test_samples_are_drawn_anew_and_again(learnt) -> None:
    """From all tokens, not the 50 likeliest that transformers would draw from unasked."""
    requests = [Request("?", sample) for sample in range(16)]

    def draw(seed: int) -> list[str]:
        sampling = Sampling(temperature=50, max_tokens=200, seed=seed)
        return [one.text for one in TransformersGenerator(learnt.directory, sampling, 16).complete(requests)]

    first = draw(1)
    ended = [text for text in first if text]
    assert len(set(ended)) == len(ended) > 1
    tokenizer = load_tokenizer(learnt.directory)
    assert len({token for text in ended for token in tokenizer.encode(text)}) > 50
    assert draw(1) == first != draw(2)


def test_bad_models_are_refused(learnt, seeds, tmp_path, capsys) -> None:
    assert main(words(Learnt(tmp_path / "gone", {}), seeds, tmp_path / "out")) == 2
    assert "no config.json there" in capsys.readouterr().err
    base = tmp_path / "base"
    base.mkdir()
    for file in learnt.directory.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    configuration = json.loads((base / "tokenizer_config.json").read_text())
    del configuration["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(configuration))
    assert main(words(Learnt(base, {}), seeds, tmp_path / "out")) == 2
    assert "no chat template" in capsys.readouterr().err


def test_vllm_is_asked_for_by_name(learnt, seeds, tmp_path, capsys) -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        assert main(words(learnt, seeds, tmp_path / "out", "--backend", "vllm")) == 2
        assert "the package vllm cannot be imported" in capsys.readouterr().err
    else:
        pytest.skip("vLLM is installed")


def test_stop_tokens(tmp_path) -> None:
    assert stop_tokens(tmp_path, 2) == [2] and stop_tokens(tmp_path, None) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_tokens(tmp_path, 2) == [7, 2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert stop_tokens(tmp_path, 2) == [9, 2]
