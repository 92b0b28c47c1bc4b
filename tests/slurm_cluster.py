"""A real SLURM on this machine: munge, a controller and four node daemons, in one temporary folder.

The four nodes share the machine's address and differ in their ports, so host names do not tell them apart. Several such
clusters may run at the same time; their ranges of job numbers do not overlap. Partition `urgent` preempts `batch`: a
preempted job receives its user signal, has `GRACE_S` seconds, and is requeued.
"""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3", "n4")
CPUS = 4  # of each node as configured, whatever the machine has
GRACE_S = 60
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
GONE = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL", ""})

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog.sh
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
JobRequeue=1
KillWait=15
MinJobAge=5
SlurmdTimeout=20
ReturnToService=0
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF State=UP
"""


class SlurmCluster:
    """A running SLURM.

    Attributes:
        folder: its configuration, state and logs.
        environment: for commands that talk to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all daemons, and wait until every node is idle."""
        port = _free_ports(1 + len(NODES))
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                port=port,
                first=port + 1,
                last=port + len(NODES),
                cpus=CPUS,
                grace=GRACE_S,
            )
        )
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        for node in NODES:
            self.task_environment(node)
        prolog = self.folder / "prolog.sh"
        prolog.write_text(f'#!/bin/sh\ncat "{self.folder}/$SLURMD_NODENAME.environment"\n')
        prolog.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *options)
        wait_for(lambda: (self.folder / "munge.socket").exists(), 10)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: self.nodes() == dict.fromkeys(NODES, "idle"), 30, "the nodes of SLURM did not start")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / "daemons.log").open("ab")
        # In a session of its own: an interrupt from a terminal reaches the tests alone, which then stop the daemons.
        process = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        log.close()
        self._daemons.append(process)

    def stop(self) -> None:
        """Stop every job and every daemon."""
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user", getpass.getuser(), timeout=10)
            wait_for(lambda: not self.run("squeue", "--noheader"), 20)
        for process in reversed(self._daemons):
            process.send_signal(signal.SIGTERM)
        for process in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for left in self.processes():
            with contextlib.suppress(psutil.Error):
                left.kill()
        for process in self._daemons:
            process.wait(10)

    # --- commands ---

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run a command of SLURM and return its output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """Node -> state in lower case."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t"],
            env=self.environment, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return dict(line.split() for line in done.stdout.splitlines())

    def state(self, job: str) -> str:
        """A job's state, as squeue prints it; empty once SLURM has forgotten the job."""
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"],
            env=self.environment, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return done.stdout.strip()

    def restarts(self, job: str) -> int:
        """How often a job has been requeued."""
        return int(self.run("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until a job is in one of ``states`` (default: any final state), and return its state."""
        wanted = states or GONE
        wait_for(lambda: self.state(job) in wanted, seconds, f"job {job} is {self.state(job)}, not {wanted}")
        return self.state(job)

    def start_again(self, job: str, restarts: int, seconds: float = 60) -> None:
        """Wait until a job has been requeued ``restarts`` times, and let it start at once.

        By itself SLURM starts it after two minutes. A start within a second may be revoked together with the old one.
        """
        wait_for(lambda: self.restarts(job) >= restarts and self.state(job) == "PENDING", seconds)
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def down(self, node: str) -> None:
        """Set a node down; its jobs are requeued."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def up(self, node: str) -> None:
        """Resume a node."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_for(lambda: self.nodes().get(node) in {"idle", "mix", "alloc"}, 30, f"{node} did not resume")

    def task_environment(self, node: str, **variables: str) -> None:
        """Set the environment variables of tasks that start on a node from now on, in place of earlier ones."""
        lines = "".join(f"export {name}={value}\n" for name, value in variables.items())
        (self.folder / f"{node}.environment").write_text(lines)

    def job_processes(self, job: str) -> list[psutil.Process]:
        """Every process of a job on any node, including those of SLURM itself."""
        found = {p for p in self.processes() if _variable(p, "SLURM_JOB_ID") == job}
        for process in list(found):  # Ray's workers overwrite their environment with their titles
            with contextlib.suppress(psutil.Error):
                found.update(process.children(recursive=True))
        return [p for p in found if _alive(p)]

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster: daemons, steps and jobs."""
        own = self.environment["SLURM_CONF"]
        return [p for p in psutil.process_iter() if _alive(p) and _variable(p, "SLURM_CONF") == own]


def _variable(process: psutil.Process, name: str) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(name)
    return None


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports, below the ephemeral range."""
    for first in range(17000 + os.getpid() % 900 * 10, 32000, 10):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def wait_for(condition: Callable[[], bool], seconds: float = 60, what: str = "condition not met in time") -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)
