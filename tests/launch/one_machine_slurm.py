"""A real SLURM on this machine alone: its own munged, slurmctld and slurmd, on free ports."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/d.pid
SlurmdSpoolDir={root}/spool
StateSaveLocation={root}/state
SlurmUser={user}
SlurmdUser={user}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/d.log
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why SLURM cannot run here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"SLURM is not installed (no {', '.join(absent)}; Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a SLURM of its own needs root (slurmd starts tasks as the submitting user)"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"


class OneMachineSlurm:
    """with OneMachineSlurm(directory) as slurm: slurm.sbatch(...)"""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = socket.gethostname().partition(".")[0]
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "OneMachineSlurm":
        for name in ("state", "spool"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        values = dict(root=self.root, host=self.host, user="root", cpus=os.cpu_count())
        ports = dict(ctld_port=_free_port(), d_port=_free_port())
        (self.root / "slurm.conf").write_text(CONF.format(**values, **ports))
        self._run("mungekey", "--create", f"--keyfile={self.root}/munge.key")
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",
                *(f"--{name}={self.root}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket")),
                *(f"--{name}-file={self.root}/munge.{name}" for name in ("log", "pid", "seed")),
            )
            self.until("munged answers", lambda: (self.root / "munge.socket").exists())
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-N", self.host)
            self.until("the node is idle", lambda: "idle" in self.node_state())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        log = open(self.root / f"{command[0]}.out", "w")  # noqa: SIM115 (the daemon's own)
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        log.close()

    def _run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env={**self.environment, **(env or {})}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def until(self, what: str, condition: Callable[[], object], seconds: float = 120) -> None:
        """Waits for `condition`; on a timeout says what the daemons said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text()[-1500:] for path in self.root.glob("*.log")}
                raise AssertionError(f"waited {seconds:.0f} s, but not: {what}\n{json.dumps(logs, indent=1)}")
            time.sleep(0.1)

    def sbatch(self, *words: str, **environment: str) -> int:
        """Submits; returns the job's number."""
        return int(self._run("sbatch", "--parsable", *words, env=environment).strip())

    def scontrol(self, *words: str) -> str:
        return self._run("scontrol", *words)

    def scancel(self, *words: str) -> None:
        self._run("scancel", *words)

    def node_state(self) -> str:
        return self._run("sinfo", "-h", "-o", "%t", check=False).strip()

    def job(self, number: int) -> dict[str, str]:
        """`scontrol show job` as a table."""
        words = self._run("scontrol", "show", "job", str(number), "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until the job is in one of `states`."""
        self.until(f"job {number} {states}", lambda: self.job(number)["JobState"] in states, seconds)
        return self.job(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
