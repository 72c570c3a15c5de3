"""The model over the compiled ops and over their references: the same function; positions reach attention."""

import pytest
import torch

from solar_mega.config.schema import KernelConfig, ParallelConfig
from tests.train.tiny import SEQUENCE, VOCABULARY, Case, architecture, one_rank, start

REFERENCES = {
    "rotary": KernelConfig(rotary="reference"),
    "swiglu": KernelConfig(swiglu="reference"),
    "rms_norm": KernelConfig(rms_norm="reference"),
    "sdpa": KernelConfig(attention="sdpa"),
    "attention": KernelConfig(attention="reference"),
}


def _logits(position_ids: torch.Tensor | None, kernels: KernelConfig | None = None) -> torch.Tensor:
    from solar_mega.checkpoint.from_hf import load_weights
    from solar_mega.checkpoint.random_weights import RandomWeights
    from solar_mega.depth.layer_map import LayerMap
    from solar_mega.model.builder import build_model

    arch, parallel = architecture(), ParallelConfig()
    chunks = build_model(arch, parallel, "fp32", kernels)
    identity = LayerMap.parse("identity", arch.num_layers)
    load_weights(chunks, RandomWeights(arch, seed=7), arch, identity, parallel)
    tokens = torch.randint(0, VOCABULARY, (3, SEQUENCE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return chunks[0](tokens, position_ids, None)


def _gradients(case: Case) -> dict[str, torch.Tensor]:
    """By name, of weights whose DDP would add them up in `main_grad`, and in `grad` without it."""
    chunks, trainer = start(case)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(SEQUENCE)[None].expand(2, -1)
    wrapped = trainer.chunks[0]
    collected = []
    for _ in range(2):  # the second time over what the first left in the buffers
        wrapped.zero_grad_buffer()
        for sample in range(2):  # two micro-batches
            one = slice(sample, sample + 1)
            losses = wrapped(tokens[one, :-1], positions[one], None, labels=tokens[one, 1:])
            losses.sum().backward()
        wrapped.finish_grad_sync()
        collected.append({name: p.main_grad.clone() for name, p in chunks[0].named_parameters()})
    assert all(torch.equal(collected[0][name], collected[1][name]) for name in collected[0])
    return collected[0]


@pytest.fixture(scope="module")
def results():
    results = {}
    restart = torch.arange(SEQUENCE) % 7
    ids = {
        "plain": torch.arange(SEQUENCE)[None],
        "per sample": torch.arange(SEQUENCE)[None].expand(3, -1),
        "later": torch.arange(SEQUENCE)[None] + 20,
        "restarting": torch.stack([restart, torch.arange(SEQUENCE), restart.flip(0)]),
    }
    with one_rank():
        for name, positions in ids.items():
            results["logits", name] = _logits(positions)
        results["logits", "none"] = _logits(None)
        for name, kernels in REFERENCES.items():
            results["logits", name] = _logits(ids["restarting"], kernels)
            results["gradients", name] = _gradients(Case(kernels=kernels))
        results["gradients", "fused"] = _gradients(Case())
        results["gradients", "bf16"] = _gradients(Case(precision="bf16"))
    return results


@pytest.mark.parametrize("name", REFERENCES)
def test_references_compute_the_same(results, name):
    torch.testing.assert_close(results["logits", name], results["logits", "restarting"], rtol=1e-4, atol=1e-5)
    for weight, want in results["gradients", "fused"].items():
        got = results["gradients", name][weight]
        assert (got - want).norm() <= 1e-5 * want.norm(), weight


def test_positions_reach_attention(results):
    plain, restarting = results["logits", "plain"], results["logits", "restarting"]
    assert torch.equal(plain, results["logits", "per sample"]) and torch.equal(
        plain, results["logits", "none"]
    )
    # Rotary positions are relative: all of them later changes nothing, a restart does.
    torch.testing.assert_close(plain, results["logits", "later"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain[1], restarting[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain[0, :7], restarting[0, :7], rtol=1e-5, atol=1e-6)
    assert (plain[0, 7:] - restarting[0, 7:]).abs().max() > 1e-2


def test_bf16_gradients_are_those_of_fp32_within_its_precision(results):
    for weight, want in results["gradients", "fused"].items():
        got = results["gradients", "bf16"][weight]
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.05 * want.norm(), weight
