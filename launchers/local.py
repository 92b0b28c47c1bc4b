"""This machine as a cluster of one node: a job is a process that submitit starts here."""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import submitit

from launchers.allocation import Assignment
from launchers.driver import run
from launchers.jobs import Job, release, submitted
from mvhpc.config import ConfigError

MINUTES = 7 * 24 * 60  # submitit ends a job after a few minutes where no limit is set


def check(nodes: int) -> None:
    """Whether this machine can give that many nodes.

    Raises:
        ConfigError: more than one.
    """
    if nodes != 1:
        raise ConfigError(
            f"--nodes {nodes}: the local cluster is this one machine; take --nodes 1 and set compute.workers instead"
        )


def executor(folder: Path) -> submitit.LocalExecutor:
    """What submits to this machine, with its job files in ``folder`` and all the GPUs this process may use."""
    gpus = _gpus()
    submitter = submitit.LocalExecutor(folder)
    submitter.update_parameters(timeout_min=MINUTES, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True)
    return submitter


def script(folder: Path) -> str:
    """The command that a submitted job is."""
    return f"{sys.executable} -u -m submitit.core._submit {folder}"


def work(assignment: Assignment) -> None:
    """What the job does."""
    place, number = Path(assignment.run), os.environ["SUBMITIT_LOCAL_JOB_ID"]
    job = submitted(place, number, "local", assignment.stage, 1)
    try:
        run(assignment.stage, assignment.values, assignment.chained)
        job.tell("finished")
    except Exception as error:
        job.tell("failed", why=f"{type(error).__name__}: {error}")
        raise
    finally:
        release(place, number)


def born(job: str) -> float:
    """When the process of a job began, in seconds since 1970; 0 where there is none."""
    try:
        process = psutil.Process(int(job))
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0


def state(job: Job) -> str:
    """``running``, or empty where it is over.

    Raises:
        ConfigError: a job of another machine, of which nothing can be said here.
    """
    if job.host != socket.gethostname():
        raise ConfigError(f"job {job.id} is a process on {job.host}; ask there")
    return "running" if born(job.id) == job.born else ""


def cancel(job: Job) -> None:
    """End a job; its process ends those that it started."""
    if state(job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.id), signal.SIGINT)


def _gpus() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(gpu) for gpu in visible.split(",") if gpu.isdigit()]
    import torch

    return list(range(torch.cuda.device_count()))
