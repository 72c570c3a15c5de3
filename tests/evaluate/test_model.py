"""Scores, texts and perplexity of our model against transformers, and layouts against each other."""

import math
from pathlib import Path

import pytest
import torch

from solar_mega.config.schema import ParallelConfig
from solar_mega.errors import UserError
from solar_mega.evaluate.generation import Decoding
from solar_mega.evaluate.packing import Request
from tests.distributed import run_ranks
from tests.train.tiny import one_rank

GENERATED = 12


def requests() -> list[Request]:
    """Shared contexts of several lengths (beyond the window of 40), and one text on its own."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 512, (count,), generator=generator).tolist()

    contexts = [draw(length) for length in (1, 9, 70, 130)]
    return [Request(c, draw(1 + n)) for c in contexts for n in range(3)] + [Request([1], draw(60))]


def by_transformers(directory: Path) -> tuple[list[list[float]], list[bool], list[list[int]]]:
    """(log-probs, greedy or not, greedy continuations of the first contexts)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    logps, greedy, texts = [], [], []
    with torch.no_grad():
        for request in requests():
            tokens = torch.tensor([[*request.context, *request.continuation]])
            rows = model(tokens[:, :-1]).logits[0, -len(request.continuation) :].double().log_softmax(-1)
            targets = tokens[0, -len(request.continuation) :]
            logps.append(rows.gather(-1, targets[:, None])[:, 0].tolist())
            greedy.append(bool((rows.argmax(-1) == targets).all()))
        for prompt in prompts():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=GENERATED, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            texts.append(out[: out.index(2)] if 2 in out else out)
    return logps, greedy, texts


def prompts() -> list[list[int]]:
    return [list(request.context) for request in requests()[::3]]


def ours(directory: Path, parallel: ParallelConfig):
    """What rank 0 gets; None on the others. Groups must exist."""
    from solar_mega.evaluate.model import opened

    with opened(directory, parallel) as model:
        if not model.leads:
            return None
        scores = model.score(requests(), batch_tokens=150)
        texts = model.generate(prompts(), Decoding(GENERATED, eos_id=2, batch_rows=3))
        drawn = model.generate(prompts(), Decoding(GENERATED, temperature=1.0, seed=4, suppress=(1, 2)))
        return scores, [list(t.tokens) for t in texts], [list(t.tokens) for t in drawn]


def on_layouts(directory: Path):
    """Every layout of two ranks, one after the other."""
    from solar_mega.runtime import parallel as ranks

    results = []
    for parallel in (ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig()):
        with ranks.running(parallel, threads=1):
            results.append(ours(directory, parallel))
    return results


def assert_same(ours, expected) -> None:
    scores, texts, _ = ours
    logps, greedy, expected_texts = expected
    for score, theirs in zip(scores, logps, strict=True):
        # fp32 rounding of two orders of the same sums, over logits of order 10.
        assert score.logps == pytest.approx(theirs, abs=1e-4)
    assert [score.greedy for score in scores] == greedy
    assert texts == expected_texts


@pytest.fixture(scope="module")
def expected(model_dir):
    return by_transformers(model_dir)


@pytest.fixture(scope="module")
def alone(model_dir):
    with one_rank():
        return ours(model_dir, ParallelConfig())


def test_scores_and_texts_are_those_of_transformers(alone, expected):
    assert_same(alone, expected)


def test_two_ranks_agree_on_every_layout(model_dir, alone, expected):
    first, second = run_ranks(on_layouts, 2, model_dir)
    assert second == [None, None, None]
    for result in first:
        assert_same(result, expected)
        assert result[2] == alone[2]  # sampled: the noise belongs to the sequence


def test_too_long_a_generation_is_refused(model_dir):
    from solar_mega.evaluate.model import opened

    with one_rank(), opened(model_dir, ParallelConfig()) as model, pytest.raises(UserError, match="512"):
        model.generate([[1] * 10], Decoding(503))


def test_perplexity_against_transformers(model_dir):
    from transformers import AutoModelForCausalLM

    from solar_mega.evaluate.model import opened
    from solar_mega.evaluate.perplexity import text_perplexity

    documents = [(torch.randint(3, 512, (n,)).tolist(), 5 * n) for n in (30, 1100)]
    with one_rank(), opened(model_dir, ParallelConfig()) as model:
        result = text_perplexity(model, documents, prefix=1, stride=100)
    reference = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    nats = 0.0
    for tokens, _ in documents:
        # Token by token: a context of up to 512 tokens, in windows that move on by 100 after the first 512.
        at = 0
        while at < len(tokens):
            stop = min(len(tokens), 512 if at == 0 else at + 100)
            begin = max(0, stop - 513)
            window = ([1] if at == 0 else []) + tokens[begin:stop]
            with torch.no_grad():
                rows = reference(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
            scored = tokens[at:stop]
            nats -= sum(float(row[token]) for row, token in zip(rows[-len(scored) :], scored, strict=True))
            at = stop
    assert result.tokens == 1130 and result.documents == 2
    assert math.log(result.perplexity) == pytest.approx(nats / 1130, abs=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (5 * 1130), abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2_windows", "phi3", "llama3"])
def test_other_families(family, tmp_path):
    from transformers import AutoModelForCausalLM

    from solar_mega.evaluate.model import opened
    from tests.families import make_family

    directory = make_family(family, tmp_path)
    generator = torch.Generator().manual_seed(2)
    context = torch.randint(3, 96, (20,), generator=generator).tolist()
    asked = [Request(context, torch.randint(3, 96, (4,), generator=generator).tolist()) for _ in range(3)]
    with one_rank(), opened(directory, ParallelConfig(), "fp32") as model:
        scores = model.score(asked)
        (text,) = model.generate([context], Decoding(GENERATED))
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        for request, score in zip(asked, scores, strict=True):
            tokens = torch.tensor([[*request.context, *request.continuation]])
            rows = reference(tokens[:, :-1]).logits[0, -4:].double().log_softmax(-1)
            assert score.logps == pytest.approx(
                rows.gather(-1, tokens[0, -4:, None])[:, 0].tolist(), abs=1e-4
            )
        tokens = list(context)
        for _ in range(GENERATED):
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(text.tokens) == tokens[len(context) :]
