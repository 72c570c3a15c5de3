"""The model's loss and gradients through each of its paths are Megatron's; bad settings are refused."""

from dataclasses import replace

import pytest
import torch

from solar_mega.config.schema import KernelConfig
from tests.distributed import run_ranks
from tests.ranks import layout
from tests.train.tiny import Case, batches, one_rank, start

PATHS = {
    "reference": KernelConfig(token_loss="reference"),
    "pieces": KernelConfig(),
    "all logits": KernelConfig(loss_logits_mib=0),
}


def _losses_and_gradients(case: Case, promise: bool = True):
    """Losses [b, s] and the gradient of every parameter of (losses * mask).sum(), or of a sum of their
    squares."""
    (chunk,), _ = start(case)
    batch = next(iter(batches(case)[0]))
    options = {"loss_mask": batch["loss_mask"]} if promise else {}
    losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **options)
    masked = losses.float() * batch["loss_mask"]
    (masked if promise else masked.square()).sum().backward()
    # Data parallelism moves each gradient into its fp32 buffer.
    gradients = {name: p.main_grad.clone() for name, p in chunk.named_parameters()}
    return masked.detach(), gradients


def _all_paths(case: Case, promise: bool):
    return {
        name: _losses_and_gradients(replace(case, kernels=kernels), promise)
        for name, kernels in PATHS.items()
    }


def _on_ranks(case: Case, promise: bool):
    options = {key: value for key, value in vars(case.parallel).items() if key != "dp"}
    with layout(**options):
        return _all_paths(case, promise)


def _check(results, tolerance: float):
    want_losses, want = results["reference"]
    for name in ("pieces", "all logits"):
        losses, gradients = results[name]
        torch.testing.assert_close(losses, want_losses, rtol=tolerance, atol=tolerance)
        assert gradients.keys() == want.keys()
        for key, gradient in gradients.items():
            assert (gradient - want[key]).norm() <= tolerance * want[key].norm() + 1e-7, (name, key)


@pytest.mark.parametrize("promise", [True, False], ids=["loss_mask given", "squares of losses"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_every_path_gives_megatrons_losses_and_gradients(tied, promise):
    with one_rank():
        _check(_all_paths(replace(Case(), tied=tied), promise), 1e-5)


def test_in_bf16_within_its_rounding():
    """A logit and its gradient are rounded to 2^-9 each; Megatron's own loss rounds them too."""
    with one_rank():
        _check(_all_paths(replace(Case(), precision="bf16"), True), 2e-2)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2, sequence parallel"])
def test_over_two_ranks(sequence_parallel):
    case = Case().on(2, sequence_parallel=sequence_parallel)
    for results in run_ranks(_on_ranks, 2, case, True):
        _check(results, 1e-5)


def test_masked_tokens_have_no_loss_whatever_their_label():
    with one_rank():
        (chunk,), _ = start(Case())
        batch = next(iter(batches(Case())[0]))
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        inputs = (batch["tokens"], batch["position_ids"], None)
        losses = chunk(*inputs, labels=labels, loss_mask=batch["loss_mask"])
        assert (losses[batch["loss_mask"] == 0] == 0).all() and (losses[batch["loss_mask"] == 1] > 0).all()
        assert torch.equal(losses, chunk(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"]))
        assert chunk(*inputs).shape == (*labels.shape, 96)  # logits when there are no labels
