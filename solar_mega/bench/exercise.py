"""`python -m solar_mega.bench.exercise`: every compiled op once at awkward sizes, forward and backward.

Nothing is timed or compared: this is for a memory or race checker to watch (launch/gpu_check.sh), so it is
short. Inputs are drawn on the CPU, so that hardly any kernels but ours run.
"""

import sys

import torch

from solar_mega import ops
from solar_mega.bench.cases import OPERATIONS, Inputs, Shape, call_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# tokens, hidden, ffn, vocab, heads, kv_heads, head_dim, head_hidden, pairs: odd rows, and widths that
# take every kernel: vectors or single elements, one to several of them per thread.
SIZES = (
    (37, 264, 520, 1003, 6, 2, 24, 40, 3),
    (5, 2056, 77, 32000, 4, 4, 64, 64, 1),
    (9, 16384, 14336, 4096, 8, 1, 128, 16, 2),
    (3, 77, 1, 33, 2, 1, 10, 8, 1),
)


def _token_logprob_variants(i: Inputs) -> None:
    """The kernel with all its statistics, whole and in shards, and rows that begin anywhere."""
    options = dict(mask=i["targets"] % 3 != 0, label_smoothing=0.1, z_loss=1e-4)
    for logits in (i["logits"], i["logits"][:, 1:]):
        leaf, targets = logits.detach().requires_grad_(), i["targets"].clamp(max=logits.shape[1] - 1)
        ops.token_logprob_with_metrics(leaf, targets, **options).logps.sum().backward()


def _linear_variants(i: Inputs) -> None:
    """The gradient made in the forward."""
    leaves = [i[name].detach().requires_grad_() for name in ("hidden", "weight")]
    logps = ops.linear_token_logprob(*leaves, i["targets"], token_weights=i["dlogp"], z_loss=1e-4)
    logps.backward(i["dlogp"])


def _dpo_variants(i: Inputs) -> None:
    """Every type of mask, and the count of all chosen tokens."""
    for mask in (None, i["mask"], i["mask"].float()):
        leaf = i["logps"].detach().requires_grad_()
        ops.dpo_loss(leaf, i["cu_seqlens"], mask=mask, rpo_alpha=0.5).loss.backward()


VARIANTS = {
    "token_logprob": _token_logprob_variants,
    "linear_token_logprob": _linear_variants,
    "dpo_loss": _dpo_variants,
}
"""Kernels that the benchmarks' calls leave out: operation -> what takes the rest of them, from its inputs."""


def run(names: list[str]) -> int:
    """Runs the operations named, or all of them; returns how many calls were made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = 0
    for name in names or OPERATIONS:
        operation = OPERATIONS[name]
        for sizes in SIZES:
            for dtype in DTYPES:
                torch.manual_seed(0)
                drawn = operation.draw(Shape(*sizes, dtype), torch.device("cpu"))
                inputs = {key: tensor.to(device) for key, tensor in drawn.items()}
                for mode in operation.modes:
                    call_for(operation, operation.providers["solar_mega"], mode.name, inputs)()
                    calls += 1
                if name in VARIANTS:
                    VARIANTS[name]({key: tensor.to(device) for key, tensor in drawn.items()})
                    calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: done on {device}", flush=True)
    return calls


def main() -> int:
    if unknown := [name for name in sys.argv[1:] if name not in OPERATIONS]:
        print(f"exercise: {' '.join(unknown)}: unknown; allowed: {' '.join(OPERATIONS)}", file=sys.stderr)
        return 2
    print(ops.report())
    if torch.cuda.is_available() and not ops.available("cuda"):
        print("exercise: there is a GPU, but the ops were compiled without CUDA", file=sys.stderr)
        return 1
    run(sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
