"""`python -m solar_mega.bench.exercise`: every compiled op once at awkward sizes, forward and backward.

Nothing is timed or compared: this is for a memory or race checker to watch (launch/gpu_check.sh), so it is
short. Inputs are drawn on the CPU, so that hardly any kernels but ours run.
"""

import sys

import torch

from solar_mega import ops
from solar_mega.bench.cases import OPERATIONS, Shape, call_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# tokens, hidden, ffn, vocab, heads, kv_heads, head_dim, head_hidden, pairs: odd rows, and widths that
# take every kernel: vectors or single elements, one to several of them per thread.
SIZES = (
    (37, 264, 520, 1003, 6, 2, 24, 40, 3),
    (5, 2056, 77, 32000, 4, 4, 64, 64, 1),
    (9, 16384, 14336, 4096, 8, 1, 128, 16, 2),
    (3, 77, 1, 33, 2, 1, 10, 8, 1),
)


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
