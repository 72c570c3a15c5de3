"""`solar-mega bench WHAT`: benchmarks, each beside its peers and paired in one run."""

import os
from collections.abc import Sequence

from solar_mega.config.command_line import parse_options
from solar_mega.errors import UserError

_HELP = """usage: solar-mega bench WHAT [OPTIONS]    solar-mega bench WHAT --help

  kernels  our ops beside PyTorch's and installed peers', against the memory roofline
  dpo      time and peak memory of the DPO loss from hidden states: all logits at once, ours, and peers'
  dpo-step peak memory and time of a DPO step: cached reference, beside TRL with two models
  step     one training step, beside transformers and stock megatron-core
  loop     our training loop beside a bare megatron-core loop; background saves beside saves waited for
  tokenize text to a corpus, beside the way of Megatron-LM's preprocess_data.py
  merge    merging two 7B models, beside cp and mergekit
  merge-error  merged weights against fp64, ours and mergekit's
  convert  every route of the converter on a generated checkpoint, beside cp and mergekit
  evaluate the paper's tasks, beside lm-evaluation-harness's own transformers model"""


def bench(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    what, *words = argv
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch's profiler counts our bytes; its log is not for readers
    if what == "step":
        from solar_mega.bench import step

        step.run(parse_options(step.StepBench, words, "bench step"))
    elif what == "kernels":
        from solar_mega.bench import kernels

        kernels.run(parse_options(kernels.KernelBench, words, "bench kernels"))
    elif what == "dpo":
        from solar_mega.bench import dpo

        dpo.run(parse_options(dpo.DPOBench, words, "bench dpo"))
    elif what == "dpo-step":
        from solar_mega.bench import dpo_step

        dpo_step.command(words)
    elif what == "merge":
        from solar_mega.bench import merge

        merge.run(parse_options(merge.MergeBench, words, "bench merge"))
    elif what == "merge-error":
        from solar_mega.bench import merge_error

        merge_error.run(parse_options(merge_error.MergeErrorBench, words, "bench merge-error"))
    elif what == "convert":
        from solar_mega.bench import convert

        convert.run(parse_options(convert.ConvertBench, words, "bench convert"))
    elif what == "evaluate":
        from solar_mega.bench import evaluate
        from solar_mega.evaluate.command import prepare_harness

        options = parse_options(evaluate.EvaluateBench, words, "bench evaluate")
        prepare_harness()
        evaluate.run(options)
    elif what == "loop":
        from solar_mega.bench import loop

        loop.run(parse_options(loop.LoopBench, words, "bench loop"))
    elif what == "tokenize":
        from solar_mega.bench import tokenize

        tokenize.run(parse_options(tokenize.TokenizeBench, words, "bench tokenize"))
    else:
        raise UserError(
            f"bench {what}: unknown; allowed: kernels, dpo, dpo-step, step, loop, tokenize, merge, "
            "merge-error, convert, evaluate"
        )
    return 0
