"""This machine as a cluster of one node: a job is a process that submitit starts."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launchers.allocation import Assignment
from launchers.driver import run_stage
from launchers.jobs import Job, new_job, release
from launchers.process import PYTHON
from mvhpc.runs.holder import state
from mvhpc.runtime.importing import require
from mvhpc.runtime.watchdog import Interrupted

if TYPE_CHECKING:
    import submitit

MINUTES = 7 * 24 * 60  # time limit; submitit's default is a few minutes


def executor(folder: Path) -> "submitit.LocalExecutor":
    """Submits to this machine, with all GPUs that this process may use; its files are in ``folder``."""
    gpus = _gpus()
    require("cluster", "submit.py", "submitit")
    import submitit

    submitter = submitit.LocalExecutor(folder, python=PYTHON)
    submitter.update_parameters(timeout_min=MINUTES, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True)
    return submitter


def script(folder: Path) -> str:
    """The command of a job."""
    return f"{PYTHON} -u -m submitit.core._submit {folder}"


def submit(folder: Path, assignment: Assignment) -> "submitit.Job[None]":
    """Start a job. An interrupt of this terminal does not reach the process of submitit, which would kill the stage."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    try:
        return executor(folder).submit(run_job, assignment)
    finally:
        signal.signal(signal.SIGINT, before)


def run_job(assignment: Assignment) -> None:
    """The function that a job calls."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see :func:`submit`
    folder, number = Path(assignment.run), os.environ["SUBMITIT_LOCAL_JOB_ID"]
    job = new_job(folder, number, "local", assignment.stage, 1)
    try:
        run_stage(assignment.stage, assignment.values, assignment.chained)
        job.record("finished")
    except Interrupted as error:
        job.record("stopped", reason=str(error))
        raise
    except Exception as error:
        job.record("failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        release(folder, number)


def cancel(job: Job) -> None:
    """Interrupt a job's stage, which ends the processes that it started; training writes a checkpoint before."""
    if state(dataclasses.asdict(job)):
        with contextlib.suppress(psutil.Error, OSError):
            submitits = psutil.Process(int(job.id))
            for process in submitits.children() or [submitits]:
                process.send_signal(signal.SIGKILL if _ignores_interrupts(process.pid) else signal.SIGINT)


def _ignores_interrupts(process: int) -> bool:
    """Whether a process ignores SIGINT, as one does in which the stage has not begun; see :func:`submit`."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1)


def _gpus() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(gpu) for gpu in visible.split(",") if gpu.isdigit()]
    import torch

    return list(range(torch.cuda.device_count()))
