"""Token log-probs under autograd, torch.compile and recomputation; and what is refused."""

import pytest
import torch
from torch.library import opcheck

from solar_mega import ops
from tests.ops.devices import DEVICES
from tests.ops.test_token_logprob import inputs, run

pytestmark = pytest.mark.skipif(not ops.available(), reason=ops.report())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    logits, targets, dlogps = inputs((4, 3, 48), dtype, device)
    mask = targets > 5
    library = torch.ops.solar_mega
    leaf = logits.clone().requires_grad_()
    opcheck(library.token_logprob.default, (leaf, targets, None, 48))
    opcheck(
        library.token_logprob.default,
        (leaf.transpose(0, 1), targets.t().contiguous(), None, 40, 0.1, 0.2, True),
    )
    opcheck(library.token_logprob_partial.default, (logits, targets, mask, 48, 90, True, True))
    stats = library.token_logprob_partial(logits, targets, mask, 0, 48, True, False)
    opcheck(library.token_logprob_combine.default, (stats[None], 48, 0.1))
    saved = library.token_logprob(logits, targets, mask, 48)[1]
    opcheck(library.token_logprob_backward.default, (dlogps, logits, targets, saved, 0, 48))
    opcheck(library.token_logprob_backward_.default, (dlogps, logits, targets, saved, 0, 48))


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_and_the_public_function_have_the_same_gradient(device):
    tensors = inputs((6, 400), torch.float32, device)
    public = run(ops.token_logprob, *tensors)
    raw = run(lambda x, t: torch.ops.solar_mega.token_logprob(x, t, None, 400)[0], *tensors)
    assert all(torch.equal(a, b) for a, b in zip(public, raw, strict=True))


def test_compiles_into_one_graph():
    logits, targets, _ = inputs((6, 40), torch.float32, "cpu")

    def loss(x):
        return ops.token_logprob(x.sin(), targets, label_smoothing=0.1).square().sum()

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    loss(leaves[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_recomputation_gives_the_same_gradient():
    logits, targets, dlogps = inputs((6, 40), torch.float32, "cpu")

    def recomputed(x, t):
        again = lambda y: ops.token_logprob(y * 2, t, inplace_backward=True)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(again, x, use_reentrant=False)

    kept = run(lambda x, t: ops.token_logprob(x * 2, t), logits, targets, dlogps)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(recomputed, logits, targets, dlogps), strict=True))


def test_logits_overwritten_by_the_backward_cannot_be_used_again():
    logits, targets, _ = inputs((3, 40), torch.float32, "cpu")
    made = logits.requires_grad_() * 2
    logps = ops.token_logprob(made, targets, inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()
    made = logits * 2
    first, second = ops.token_logprob(made, targets, inplace_backward=True).sum(), made.square().sum()
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_second_derivative_is_refused():
    logits, targets, _ = inputs((2, 8), torch.float32, "cpu")
    logits.requires_grad_()
    (dx,) = torch.autograd.grad(ops.token_logprob(logits, targets).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


GOOD, TARGETS = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "dtype of logits": (
        dict(logits=GOOD.double()),
        "logits has dtype Double; allowed: Float, BFloat16, Half",
    ),
    "dtype of targets": (dict(targets=TARGETS.int()), "targets has dtype Int; it must be Long"),
    "shape of targets": (
        dict(targets=TARGETS[:1]),
        r"targets has shape \[1, 3\].*one value per row of logits.*\[2, 3, 8\]",
    ),
    "dtype of mask": (dict(mask=TARGETS), "mask has dtype Long; it must be Bool"),
    "shape of mask": (dict(mask=TARGETS[0] == 0), r"mask has shape \[3\].*\[2, 3, 8\]"),
    "scalar": (dict(logits=torch.tensor(1.0)), r"logits has shape \[\]; allowed: \[..., columns\]"),
    "no columns": (
        dict(logits=torch.zeros(2, 3, 0)),
        r"logits has shape \[2, 3, 0\]; allowed: .* columns >= 1",
    ),
    "last stride": (dict(logits=torch.zeros(2, 8, 3).mT), r"logits .* has strides \[24, 1, 3\]; allowed:"),
    "target too large": (dict(targets=TARGETS + 8), "targets has 8 at position 0; allowed: 0 to 7, or -100"),
    "target in the padding": (
        dict(targets=TARGETS + 6, vocab_size=6),
        "targets has 6 at position 0; allowed: 0 to 5",
    ),
    "negative target": (dict(targets=TARGETS - 1), "targets has -1 at position 0; allowed: 0 to 7"),
    "vocabulary": (dict(vocab_size=9), "vocab_size is 9; allowed: 1 to 8, the columns of all ranks"),
    "smoothing": (dict(label_smoothing=1.0), "label_smoothing is 1; allowed: 0 <= it < 1"),
    "z-loss": (dict(z_loss=-1.0), "z_loss is -1; allowed: a finite number >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=f"^token_logprob: {message}"):
        ops.token_logprob(**{"logits": GOOD, "targets": TARGETS, **change})


def test_bad_backward_and_combine_arguments_are_refused():
    library, dlogps, saved = torch.ops.solar_mega, torch.zeros(2, 3), torch.zeros(2, 2, 3)
    with pytest.raises(
        RuntimeError, match=r"^token_logprob_backward: saved has shape \[2, 3\]; it must be .*\[2, 2, 3\]"
    ):
        library.token_logprob_backward(dlogps, GOOD, TARGETS, saved[0], 0, 8)
    with pytest.raises(RuntimeError, match="dlogps has dtype Double; it must be Float"):
        library.token_logprob_backward(dlogps.double(), GOOD, TARGETS, saved, 0, 8)
    with pytest.raises(RuntimeError, match="first_column is -1; allowed: >= 0"):
        library.token_logprob_backward(dlogps, GOOD, TARGETS, saved, -1, 8)
    with pytest.raises(RuntimeError, match=r"stats has shape \[2, 3\].*\[shards, 4, ...\]"):
        library.token_logprob_combine(torch.zeros(2, 3), 8, 0.1)


def test_leaves_are_not_overwritten():
    with pytest.raises(RuntimeError, match="inplace_backward would overwrite logits, which is a leaf"):
        ops.token_logprob(GOOD.clone().requires_grad_(), TARGETS, inplace_backward=True)


def test_the_reference_refuses_too():
    for change, message in (
        (dict(targets=TARGETS + 8), "targets has 8 at position 0; allowed: 0 to 7, or -100"),
        (dict(targets=TARGETS[0]), r"targets has shape \[3\]; it must be \[2, 3\]"),
        (dict(mask=TARGETS), "mask is torch.int64 on cpu; it must be torch.bool on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.token_logprob(**{"logits": GOOD, "targets": TARGETS, "implementation": "reference", **change})


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match='implementation is \'fast\'; allowed: "fused", "reference"'):
        ops.token_logprob(GOOD, TARGETS, implementation="fast")
