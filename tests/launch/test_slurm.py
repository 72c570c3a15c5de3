"""launch/slurm/run.sbatch on a real SLURM: signalled, requeued, drained, cancelled."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from solar_mega.checkpoint.store import CheckpointStore
from tests.launch.one_machine_slurm import OneMachineSlurm, missing

ROOT = Path(__file__).resolve().parents[2]
STEPS = 90

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.skipif(
        "SOLAR_MEGA_SLURM" not in os.environ, reason="takes four minutes; SOLAR_MEGA_SLURM=1 runs it"
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with OneMachineSlurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Job:
    """The tiny pretraining on two tasks."""

    def __init__(self, slurm, inputs, place: Path, *flags: str, preflight: bool = False, more: str = ""):
        self.slurm, self.place, self.out = slurm, place, place / "run"
        place.mkdir()
        settings = f"--train.steps {STEPS} --train.eval_interval 50 --parallel.pp 2"
        words = inputs.words(self.out, settings, more)
        fixed = f"--nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --gres=none --output={place}/job.log"
        command = [*fixed.split(), *flags, f"--chdir={ROOT}", "launch/slurm/run.sbatch", *words]
        self.number = slurm.sbatch(
            *command,
            LOGS=str(place / "logs"),
            PREFLIGHT=str(int(preflight)),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{slurm.environment['PATH']}",
            VIRTUAL_ENV=str(Path(sys.executable).parents[1]),
            PYTHONPATH=str(ROOT),
        )

    def wait_for(self, *states: str, seconds: float = 150) -> None:
        self.slurm.wait_for(self.number, *states, seconds=seconds)

    def wait_for_step(self, step: int) -> None:
        """Until the run has written that many steps."""

        def there() -> bool:
            state = self.slurm.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING"), f"{state}\n{self.log()}"
            return len(self.steps()) >= step

        self.slurm.until(f"step {step} of job {self.number}", there)

    def steps(self) -> list[int]:
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in rows if "grad_norm" in row]

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def weights(self) -> str:
        files = sorted((self.out / "hf").glob("*.safetensors"))
        assert files, self.log()
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def checkpoint(self) -> Path | None:
        return CheckpointStore(self.out / "checkpoints").latest()

    def log(self) -> str:
        ranks = sorted(self.place.glob("logs/*/*/rank-*.log"))
        return "\n".join(f"-- {file.name}\n{file.read_text()}" for file in [self.place / "job.log", *ranks])


@pytest.fixture(scope="module")
def undisturbed(slurm, inputs, tmp_path_factory) -> Job:
    job = Job(slurm, inputs, tmp_path_factory.mktemp("undisturbed") / "job", preflight=True)
    job.wait_for("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED")
    assert slurm.job(job.number)["JobState"] == "COMPLETED", job.log()
    return job


def test_a_job_runs_to_its_end(undisturbed):
    assert undisturbed.steps() == list(range(1, STEPS + 1)) and undisturbed.restarts() == 0
    log = (undisturbed.place / "job.log").read_text()
    assert "preflight: 2 ranks work together" in log and "ended with 0" in log
    names = {file.name for file in undisturbed.place.glob("logs/*/try-0/rank-*.log")}
    assert names == {"rank-0.log", "rank-1.log"}


def test_signalled_on_a_draining_node_it_goes_on_elsewhere_in_time(slurm, undisturbed, inputs, tmp_path):
    """An operator drains the node and signals the job: it saves, requeues, waits, and when a node is there
    again goes on to the same weights."""
    job = Job(slurm, inputs, tmp_path / "job")
    job.wait_for_step(3)
    slurm.scontrol("update", f"NodeName={slurm.host}", "State=DRAIN", "Reason=maintenance")
    slurm.scancel("--signal=USR1", str(job.number))
    slurm.until("the job is requeued", lambda: job.restarts() == 1)
    job.wait_for("PENDING")
    left_at = job.steps()[-1]
    assert 3 <= left_at < STEPS, job.log()
    assert job.checkpoint().name == f"step-{left_at:08d}"
    assert "USR1: saved at step" in job.log() and "ended with 75" in job.log()
    slurm.scontrol("update", f"NodeName={slurm.host}", "State=RESUME")
    job.wait_for("COMPLETED", "FAILED")
    assert slurm.job(job.number)["JobState"] == "COMPLETED", job.log()
    assert f"at step {left_at}" in job.log() and job.steps() == list(range(1, STEPS + 1))
    assert {path.name for path in job.place.glob("logs/*/*")} == {"try-0", "try-1"}
    assert job.weights() == undisturbed.weights()


def test_a_cancelled_job_leaves_a_checkpoint_and_does_not_come_back(slurm, inputs, tmp_path):
    job = Job(slurm, inputs, tmp_path / "job")
    job.wait_for_step(3)
    slurm.scancel(str(job.number))
    job.wait_for("CANCELLED")
    slurm.until("the node is free again", lambda: "idle" in slurm.node_state())
    assert job.restarts() == 0 and len(job.steps()) < STEPS
    assert job.checkpoint() is not None, job.log()
    assert "requeue" not in (job.place / "job.log").read_text().lower()


@pytest.mark.slow
@pytest.mark.skipif("SOLAR_MEGA_SLURM_MINUTES" not in os.environ, reason="waits for SLURM's minutes; opt in")
def test_the_time_limit_announces_itself(slurm, undisturbed, inputs, tmp_path):
    """SLURM's own signal ahead of the time limit. It counts minutes, looks twice a minute and sends up to a
    minute early: after 50 to 110 of these 120 seconds. Long validations, which change no weight, make the run
    last for twice as long on a fast machine."""
    slowly = "--train.eval_interval 1 --train.eval_samples 1152"
    job = Job(slurm, inputs, tmp_path / "job", "--time=2", "--signal=USR1@10", more=slowly)
    slurm.until("the job is requeued", lambda: job.restarts() >= 1, seconds=150)
    left_at = job.steps()[-1]
    assert 1 <= left_at < STEPS and job.checkpoint().name == f"step-{left_at:08d}", job.log()
    assert "USR1: saved at step" in job.log() and "ended with 75" in job.log()
    job.wait_for("COMPLETED", "FAILED", "TIMEOUT", seconds=600)
    assert slurm.job(job.number)["JobState"] == "COMPLETED", job.log()
    assert job.steps() == list(range(1, STEPS + 1))
    assert job.weights() == undisturbed.weights()


def test_a_mistake_is_not_requeued(slurm, inputs, tmp_path):
    job = Job(slurm, inputs, tmp_path / "job", more="--parallel.tp 3")
    job.wait_for("FAILED", "COMPLETED")
    assert slurm.job(job.number)["ExitCode"] == "2:0" and job.restarts() == 0
    assert "world size 2 is not a multiple" in job.log()
