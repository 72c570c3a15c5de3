"""Starts ranks that have imported everything already: `tests.distributed` keeps one of these per process.

A fresh rank spends seven seconds on importing torch, transformers and megatron-core, more than most tests
take. This process imports them once, does nothing with them (so there is no thread that a fork could lose)
and forks a launcher for every line on its standard input:

    {"call": FILE, "folder": DIRECTORY, "ranks": N, "environment": {...}}  ->  {"pid": P}  ->  {"code": C}

The launcher is torchrun's own agent, and the ranks are forks of it; all of them are one process group, P.
What they print goes to DIRECTORY/output.
"""

import importlib.util
import json
import os
import pickle
import signal
import sys
import traceback
import warnings
from pathlib import Path


def warm_up() -> None:
    """Everything a rank imports; nothing that starts a thread."""
    warnings.simplefilter("ignore")
    import pytest  # noqa: F401
    import torch.distributed.launcher.api  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    import solar_mega.align.dpo
    import solar_mega.align.sft
    import solar_mega.checkpoint.megatron
    import solar_mega.checkpoint.to_hf
    import solar_mega.data.datasets
    import solar_mega.model.builder
    import solar_mega.train.optimizer
    import solar_mega.train.pretrain
    import solar_mega.train.saves
    import solar_mega.train.step  # noqa: F401


def rank(call: str, folder: str) -> None:
    """One rank: calls the worker and leaves its result. The agent takes a return for success; a failure ends
    the process here, as it would end a script."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's own handlers came along with the fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        file, name, args = pickle.loads(Path(call).read_bytes())
        spec = importlib.util.spec_from_file_location("worker_module", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["worker_module"] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(*args)
        Path(folder, f"rank{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(result))
    except SystemExit as error:
        if error.code:
            _end(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        _end(1)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(call: str, folder: str, ranks: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.05,
    )
    try:
        elastic_launch(config, rank)(call, folder)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _fork(call: str, folder: str, ranks: int, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, place)
        code = launch(call, folder, ranks)
    except BaseException:
        traceback.print_exc()
    finally:
        _end(code)


def main() -> None:
    warm_up()
    for line in sys.stdin:
        pid = _fork(**json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
