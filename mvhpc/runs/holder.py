"""The job that holds a run folder, as `mvhpc submit` records it in ``RUN/jobs/lock``, and whether it goes on.

What else a job leaves there: :mod:`launchers.jobs`.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from mvhpc.config import ConfigError
from mvhpc.runs import squeue
from shards.files import lock_file

DEPTH = 4  # of the deepest run folder below a project's: FOLD/baselines/NAME/QUERY
NO_RUNS = ("sub-", ".")  # beginnings of names of folders without run folders


def run_folders(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """A folder, and those below it, that jobs were submitted for."""
    with contextlib.suppress(PermissionError):  # a folder that is not the user's, as lost+found of a disk
        if (root / "jobs").is_dir():
            yield root
        if depth and root.is_dir():
            for child in sorted(root.iterdir()):
                if child.is_dir() and not child.name.startswith(NO_RUNS):
                    yield from run_folders(child, depth - 1)


def holder(run: Path) -> dict[str, Any]:
    """The job that holds a run folder; empty: none. Nothing is written there."""
    path = run / "jobs" / "lock"
    if not path.is_file():
        return {}
    with lock_file(path) as descriptor:
        return recorded(descriptor)


def recorded(descriptor: int) -> dict[str, Any]:
    """The job in an open ``RUN/jobs/lock``, which has to be locked: its content is replaced in two steps."""
    text = os.pread(descriptor, 2**16, 0).decode()
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def state(job: dict[str, Any]) -> str:
    """``pending (reason)``, ``running`` or another state of a job; empty where it is over.

    Raises:
        ConfigError: the state cannot be found out from here.
    """
    if job["cluster"] == "slurm":
        return squeue.state(job["id"])
    if job["host"] != socket.gethostname():
        raise ConfigError(f"job {job['id']} is a process on {job['host']}; run this command there")
    started = process_start(job["id"])
    return "running" if started and started == job["process_start"] else ""


def process_start(job: str) -> float:
    """When the process with that number started, in seconds since 1970; 0 where there is none."""
    try:
        process = psutil.Process(int(job))
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0


def assignment(run: Path, job: str) -> dict[str, Any]:
    """What a job is to do, as recorded at its submission; empty where nothing is recorded."""
    path = run / "jobs" / job / "job.json"
    found: dict[str, Any] = json.loads(path.read_text()).get("assignment", {}) if path.is_file() else {}
    return found


def read_paths(run: Path, job: str) -> set[Path]:
    """The paths that a job reads, as recorded at its submission."""
    found = assignment(run, job)
    return {Path(found["cwd"], p).resolve() for paths in found.get("inputs", {}).values() for p in paths}
