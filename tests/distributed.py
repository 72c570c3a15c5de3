"""Run a function on several real ranks: torchrun, gloo, one process each.

    results = run_ranks(worker, 4, argument, ...)        # worker(argument, ...) on each rank; results by rank

The worker must be a module-level function of a test file. It runs in fresh processes, so it starts its own
groups (`solar_mega.runtime.parallel.running`), and returns something that pickles.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class RankFailure(AssertionError):
    """A rank exited with an error; the message is the end of torchrun's output."""


def run_ranks(worker, ranks: int, *args, timeout: float = 300, env: dict | None = None, check: bool = True):
    """Returns [worker(*args) of rank 0, 1, ...]; with `check=False`, the finished CompletedProcess."""
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder, "call.pkl")
        call.write_bytes(pickle.dumps((sys.modules[worker.__module__].__file__, worker.__qualname__, args)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        command += [str(Path(__file__).resolve()), str(call), folder]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        done = _run(command, {**environment, **(env or {})}, timeout)
        if not check:
            return done
        if done.returncode:
            raise RankFailure(_of_the_ranks(done.stdout + done.stderr)[-6000:])
        return [pickle.loads(Path(folder, f"rank{r}.pkl").read_bytes()) for r in range(ranks)]


def _run(command: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """subprocess.run, which on a timeout ends the ranks too and not their launcher alone."""
    launcher = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        output, errors = launcher.communicate(timeout=timeout)
    except BaseException:
        import psutil

        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
        launcher.communicate()
        raise
    return subprocess.CompletedProcess(command, launcher.returncode, output, errors)


def _of_the_ranks(output: str) -> str:
    """The output up to torchrun's own traceback, which only says that a rank failed."""
    return output.split("torch/distributed/elastic/multiprocessing/api.py")[0].rsplit("\n", 1)[0] or output


def _main() -> None:
    file, name, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    spec = importlib.util.spec_from_file_location("worker_module", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_module"] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    Path(sys.argv[2], f"rank{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main()
