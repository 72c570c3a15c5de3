"""`solar-mega bench WHAT`: benchmarks, each beside its peers and paired in one run."""

from collections.abc import Sequence

from solar_mega.config.command_line import parse_options
from solar_mega.errors import UserError

_HELP = """usage: solar-mega bench WHAT [OPTIONS]    solar-mega bench WHAT --help

  step     one training step, beside transformers and stock megatron-core"""


def bench(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    what, *words = argv
    if what == "step":
        from solar_mega.bench.step import StepBench, run

        run(parse_options(StepBench, words, "bench step"))
        return 0
    raise UserError(f"bench {what}: unknown; allowed: step")
