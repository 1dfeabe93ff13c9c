"""A real Slurm on this host for tests: munged, slurmctld and a slurmd for each of two nodes, all state in one folder.

    controller ──▶ n1 (slurmd, its port)      both on 127.0.0.1, with two GPUs each by name (Slurm counts them; nothing uses them)
               └─▶ n2 (slurmd, its port)

It runs as whoever runs the tests; only installing the packages needs root.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("n1", "n2")
# Daemons are often where a user's PATH does not look.
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

_SLURM_CONF = """
ClusterName=minitron
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits as long as a credential lives: two minutes, unless said otherwise.
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
# Jobs queue here and never start.
PartitionName=closed Nodes=n1,n2 State=DOWN
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def programs_by_name(folder: Path, **programs: str) -> Path:
    """A folder of shell programs, for what a script does around Slurm rather than in it; gives the folder."""
    folder.mkdir()
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


class Cluster:
    """Submits jobs and asks about them; `log` is where their scripts write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: object, **variables: str) -> str:
        """Standard output of one of Slurm's programs."""
        done = subprocess.run(
            list(map(str, words)),
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=120,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, **variables: str) -> int:
        """`sbatch words…` with more environment variables; gives the job's number."""
        return int(self.call("sbatch", "--parsable", *words, **variables))

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job, or of a task as "ARRAY_TASK": JobState, Restarts, ExitCode, …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))

    def wait(self, number: int | str, timeout: float = 600.0) -> dict[str, str]:
        """Wait for a job's end."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in FINISHED:
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        """The ends of what daemons, jobs and nodes have written, for a failed assertion."""
        files = sorted([*self.folder.glob("*.out"), *self.folder.rglob("*.log")])
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files)


def _three_ports() -> list[int]:
    """Free ones; 17000 to 17002 unless another run of the tests has them."""
    for base in range(17000, 17500, 10):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(base, base + 3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(base, base + 3))
    raise AssertionError("no free ports from 17000 on")


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    text = _SLURM_CONF.format(host=host, ports=_three_ports(), user=getpass.getuser(), folder=folder)
    (folder / "slurm.conf").write_text(text)
    gpus = [folder / f"gpu{i}" for i in range(2)]
    for gpu in gpus:
        gpu.touch()
    (folder / "gres.conf").write_text(f"NodeName=n1,n2 Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)


def _daemons(folder: Path) -> list[Sequence[str]]:
    munge = [f"--{name}={folder / file}" for name, file in (
        ("socket", "munge.sock"), ("key-file", "munge.key"), ("pid-file", "munged.pid"),
        ("log-file", "munged.out"), ("seed-file", "munged.seed"),
    )]  # fmt: skip
    conf = ("-f", str(folder / "slurm.conf"))
    return [
        ("munged", "--foreground", "--force", *munge),
        ("slurmctld", "-D", *conf),
        *(("slurmd", "-D", "-N", node, *conf) for node in NODES),
    ]


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, wait until both nodes are idle; end jobs and daemons on the way out."""
    cluster = Cluster(folder)
    _configure(folder)
    started: list[subprocess.Popen] = []
    try:
        for words in _daemons(folder):
            with open(folder / f"{len(started)}-{words[0]}.out", "w") as out:
                started.append(subprocess.Popen(words, env=cluster.environment, stdout=out, stderr=out))
            time.sleep(0.5)
        _wait_for_nodes(cluster)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            cluster.call("scancel", "--user", getpass.getuser())
            _wait_for_nodes(cluster)
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_for_nodes(cluster: Cluster, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    states: list[str] = []
    while states != ["idle"] * len(NODES):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.5)
        with contextlib.suppress(AssertionError):
            states = cluster.call("sinfo", "--noheader", "--Node", "--partition=all", "--format=%t").split()
