"""Gradients and AdamW steps against transformers' Llama in fp64 on the same weights and samples."""

import math
from dataclasses import replace

import pytest
import torch

from solar_mega.config.schema import OptimizerConfig, ScheduleConfig
from tests.train.tiny import BATCH, Case, Samples, architecture, batches, one_rank, start

CASE = Case(
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.5, weight_decay=0.1),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=2),
    steps=6,
)


def _weights(arch) -> dict[str, torch.Tensor]:
    from solar_mega.checkpoint.names import hf_shapes
    from solar_mega.checkpoint.random_weights import RandomWeights

    drawn = RandomWeights(arch, seed=7)
    weights = {name: drawn.read_rows(name, 0, shape[0]) for name, shape in hf_shapes(arch).items()}
    generator = torch.Generator().manual_seed(5)
    return {
        # Norm weights of 1 would hide a norm that forgets to multiply by them.
        name: weight.uniform_(0.5, 1.5, generator=generator) if weight.dim() == 1 else weight
        for name, weight in weights.items()
    }


class _Weights:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def read_rows(self, name: str, start: int, stop: int, dim: int = 0) -> torch.Tensor:
        return self.weights[name].narrow(dim, start, stop - start)


def _in_hf_names(chunk, arch, value) -> dict[str, torch.Tensor]:
    """value(parameter) of every parameter, unpacked to transformers' names."""
    from solar_mega.checkpoint.names import hf_names, rule_of

    result = {}
    for name, parameter in chunk.named_parameters():
        rule, layer = rule_of(name, arch)
        tensors = rule.packing.unpack([value(parameter).detach().double()], arch)
        result.update(zip(hf_names(rule, layer), tensors, strict=True))
    return result


def _ours(tied: bool, clip_grad: float, steps: int):
    """(losses, gradient norms, gradients of the last step, weights after it)."""
    arch = architecture(tied)
    case = replace(CASE, tied=tied, optimizer=replace(CASE.optimizer, clip_grad=clip_grad))
    with one_rank(case.parallel):
        (chunk,), trainer = start(case, _Weights(_weights(arch)))
        data, micro_batches = batches(case)
        results = [trainer.step(data, micro_batches) for _ in range(steps)]
        gradients = _in_hf_names(chunk, arch, lambda parameter: parameter.main_grad)
        weights = _in_hf_names(chunk, arch, lambda parameter: parameter)
    return [r.loss for r in results], [r.grad_norm for r in results], gradients, weights


def _theirs(tied: bool, clip_grad: float, steps: int, dtype: torch.dtype):
    """The same by transformers and torch's AdamW, the loss written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    arch = architecture(tied)
    config = {key: value for key, value in arch.hf_config.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).to(dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in _weights(arch).items()}, strict=not tied)
    named = dict(model.named_parameters())
    c = CASE.optimizer
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    losses, norms = [], []
    for step in range(steps):
        samples = [Samples()[step * BATCH + i] for i in range(BATCH)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        logits = model(batch["tokens"]).logits
        per_token = -logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
        mask = batch["loss_mask"].to(dtype)
        loss = (per_token * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in named.values()]).norm()
        if clip_grad:
            for p in named.values():
                p.grad *= (clip_grad / (norm + 1e-6)).clamp(max=1)
        for group in optimizer.param_groups:
            group["lr"] = _lr(step)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    gradients = {name: p.grad.double() for name, p in named.items()}
    return losses, norms, gradients, {name: p.detach().double() for name, p in named.items()}


def _lr(done: int) -> float:
    warmup, peak = CASE.schedule.warmup_steps, CASE.optimizer.lr
    if done <= warmup:
        return peak * done / warmup
    return peak * (math.cos(math.pi * (done - warmup) / (CASE.steps - warmup)) + 1) / 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradient_of_every_parameter(tied):
    """Error ||ours - fp64|| / ||fp64|| at most twice that of transformers in fp32, which adds in other
    orders; a parameter where it happens to round luckily may use the average of all."""
    losses, norms, ours, _ = _ours(tied, clip_grad=0.0, steps=1)
    exact = _theirs(tied, 0.0, 1, torch.float64)
    peer = _theirs(tied, 0.0, 1, torch.float32)
    assert ours.keys() == exact[2].keys() and len(ours) == 4 * 9 + (2 if tied else 3)
    mine = {name: float((ours[name] - g).norm() / g.norm()) for name, g in exact[2].items()}
    its = {name: float((peer[2][name] - g).norm() / g.norm()) for name, g in exact[2].items()}
    usual = sum(its.values()) / len(its)
    assert 0 < usual < 2e-6  # the yardstick is fp32's, not the test's mistake
    assert not {name: (mine[name], its[name]) for name in mine if mine[name] > 2 * max(its[name], usual)}
    assert losses[0] == pytest.approx(exact[0][0], rel=1e-6)
    assert norms[0] == pytest.approx(exact[1][0], rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_after_adamw_steps(tied):
    """Warm-up, cosine, clipping, decay on matrices only.

    Adam divides a gradient by its own size: where fp32's error e (1e-6 of a parameter's typical gradient,
    see above) is as large as an element, its update is noise. A share t of the elements is below t of the
    typical size, so the update's error is sqrt(integral of min(1, e/t)^2 dt) = sqrt(2 e) = 1.4e-3 of it.
    """
    losses, norms, _, weights = _ours(tied, CASE.optimizer.clip_grad, CASE.steps)
    exact = _theirs(tied, CASE.optimizer.clip_grad, CASE.steps, torch.float64)
    before = _weights(architecture(tied))
    assert max(exact[1]) > CASE.optimizer.clip_grad
    assert losses == pytest.approx(exact[0], rel=1e-5)
    assert norms == pytest.approx(exact[1], rel=1e-5)
    for name, after in exact[3].items():
        update = (after - before[name].double()).norm()
        assert (weights[name] - after).norm() < 1.4e-3 * update, name
    # A decay left out, or applied to norms too, would show.
    decayed = CASE.optimizer.weight_decay * sum(map(_lr, range(CASE.steps)))
    for name, weight in before.items():
        update = (exact[3][name] - weight.double()).norm()
        assert decayed * weight.norm() > 1.4e-3 * update, name
