"""The jobs of a run, as recorded in its folder: which job may write to it now, and what happened to earlier ones.

    RUN/jobs/lock           the job that may write to the run; empty or absent: none
    RUN/jobs/JOB/job.json   what was submitted, where and from which code
    RUN/jobs/JOB/journal.jsonl   its events: start, preflight, boot, requeue, finished, ...

SLURM's accounting is not used, as many sites do not run it.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import slurm
from launchers.allocation import Assignment
from mvhpc.config import ConfigError
from mvhpc.runs.clone import git
from mvhpc.runs.folder import read_record
from mvhpc.runs.holder import holder, recorded, run_folders
from mvhpc.runs.journal import Journal, read
from mvhpc.runs.position import duration, read_position
from mvhpc.stages import STAGES
from shards.files import lock_file, write_text

PROG = "submit.py" if Path(sys.argv[0]).name == "submit.py" else "mvhpc submit"  # the command, as the user typed it
NO_RESULT = "ended without reporting a result"
STAGE_FINISHED = "stage finished"
PHASES = {"start": "preflight", "preflight": "starting Ray", "boot": "loading the stage"}  # last event -> now at work
CLOCK_S = 1.0  # by which the start of a process may be wrong
END_EVENTS = {"finished", "failed", "cancelled", "stopped"}  # the last event of a job


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        run: its run folder, absolute.
        id: SLURM's job number, or the process number of a local job.
        cluster: ``slurm`` or ``local``.
        stage: the stage that it runs.
        nodes: number of nodes requested.
        host: where it was submitted.
        submitted: when, in seconds since 1970.
        process_start: when the process of a local job started, in seconds since 1970; it tells the process from a later
            one with the same number. 0 for SLURM.
    """

    run: str
    id: str
    cluster: str
    stage: str
    nodes: int
    host: str
    submitted: float
    process_start: float = 0.0

    @property
    def folder(self) -> Path:
        """Its files, apart from the log."""
        return Path(self.run) / "jobs" / self.id

    @property
    def log(self) -> Path:
        """Its output; with several nodes that of node 0."""
        return Path(self.run) / "jobs" / f"{self.id}_0_log.out"

    def save(self, assignment: Assignment | None = None) -> None:
        """Write ``job.json``, and ``code.diff`` with the state of the code that was submitted."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        commit, diff = code_state()
        content = {**dataclasses.asdict(self), "commit": commit, "dirty": bool(diff)}
        if assignment is not None:
            content["assignment"] = dataclasses.asdict(assignment)
        write_text(self.folder / "code.diff", diff)
        write_text(self.folder / "job.json", json.dumps(content, indent=1))
        register_run(Path(self.run))

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to its journal."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        Journal(self.folder).write(event, **fields)

    def events(self) -> list[dict[str, Any]]:
        """The events in its journal; of a local job, without those of an earlier process of its number."""
        first = self.process_start - CLOCK_S
        return [event for event in read(self.folder) if event["time"] >= first]


def new_job(run: Path, job: str, cluster: str, stage: str, nodes: int, process_start: float = 0.0) -> Job:
    """A job that has just been submitted."""
    host = socket.gethostname()
    return Job(str(run.absolute()), job, cluster, stage, nodes, host, round(time.time(), 1), process_start)


def jobs_of(run: Path) -> list[Job]:
    """All jobs of a run folder, oldest first."""
    names = [f.name for f in dataclasses.fields(Job)]
    found = []
    for path in (run / "jobs").glob("*/job.json"):
        content = json.loads(path.read_text())
        found.append(Job(**{name: content[name] for name in names} | {"run": str(run.absolute())}))
    return sorted(found, key=lambda job: job.submitted)


def jobs_below(folder: Path) -> list[Job]:
    """All jobs of a run folder, or of those below a project's folder, oldest first.

    Raises:
        ConfigError: there is none.
    """
    found = [job for run in run_folders(folder) for job in jobs_of(run)]
    if not found:
        raise ConfigError(f"{folder}: no job was submitted for this folder, or one below it; see `{PROG} status`")
    return sorted(found, key=lambda job: job.submitted)


def code_state() -> tuple[str, str]:
    """(commit, differences from it) of the code; empty where it does not run from a clone."""
    return git("rev-parse", "HEAD").strip(), git("status", "--short") + git("diff", "HEAD")


# --- the lock ---


class Lock:
    """The job that may write to a run. Made by :func:`locked` alone, which holds a file lock meanwhile.

    Attributes:
        holder: the job; None: none.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        found = recorded(descriptor)
        self.holder = Job(**found) if found else None

    def set_holder(self, job: Job | None) -> None:
        """Make ``job`` the holder; None: the run is free."""
        self.holder = job
        os.ftruncate(self._descriptor, 0)
        if job is not None:
            os.pwrite(self._descriptor, json.dumps(dataclasses.asdict(job)).encode(), 0)
        os.fsync(self._descriptor)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[Lock]:
    """The lock of a run folder, for as long as it takes to read or change its holder.

    The file is never removed: another process may be waiting for this very file, and would then hold a lock on a file
    that has no name any more, beside the holder of a new one.
    """
    path = run / "jobs" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock_file(path) as descriptor:
        yield Lock(descriptor)


def holder_of(run: Path) -> Job | None:
    """The job that holds a run folder; None: none. Nothing is written there."""
    found = holder(run)
    return Job(**found) if found else None


def release(run: Path, job: str) -> None:
    """Free a run, where the job with that number holds it."""
    if (run / "jobs" / "lock").exists():
        with locked(run) as lock:
            if lock.holder is not None and lock.holder.id == job:
                lock.set_holder(None)


# --- this user's runs ---


def _registry() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mvhpc" / "runs"


def register_run(run: Path) -> None:
    """Add a run folder to this user's list. Its job has started: where that cannot be written, this is a warning."""
    line = f"{run.absolute()}"
    try:
        path = _registry()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if line not in (path.read_text().splitlines() if path.is_file() else []):
            with path.open("a") as file:
                file.write(line + "\n")
    except (OSError, RuntimeError) as error:  # the latter without a home folder
        print(f"`{PROG} status` will not list {run} ({error}); name it there: {PROG} status {run}", file=sys.stderr)


def registered_runs() -> list[Path]:
    """The run folders in this user's list that still exist."""
    path = _registry()
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Path(line) for line in lines if (Path(line) / "jobs").is_dir()]


def find_job(word: str) -> Job:
    """The job with a number, or the latest job of a run folder.

    Raises:
        ConfigError: there is none.
    """
    if Path(word).is_dir() or "/" in word:
        found = jobs_of(Path(word))
        if not found:
            raise ConfigError(f"{word}: not a run folder with jobs; give a job's number, or see `{PROG} status`")
        return found[-1]
    found = [job for run in registered_runs() for job in jobs_of(run) if job.id == word]
    if not found:
        raise ConfigError(f"no job {word} among this user's runs; `{PROG} status` lists them")
    return max(found, key=lambda job: job.submitted)


# --- the state of a job ---


def phase(job: Job) -> str:
    """What a running job does before its stage, as ``preflight``; empty once the stage is at work."""
    last = (job.events() or [{"event": ""}])[-1]
    if last["event"] not in PHASES:
        return ""
    begun = any(event["event"] == "start" and event["time"] >= last["time"] for event in read(Path(job.run)))
    status = _status_since(Path(job.run), last["time"])
    begun = begun or status == "finished" or (status == "running" and not STAGES[job.stage].trains)
    return "" if begun else PHASES[last["event"]]


def _status_since(run: Path, time: float) -> str:
    """The status that the stage of a run folder has recorded since that time; empty where it was by an earlier job."""
    status: str = read_record(run).get("status", "")
    return status if status and (run / "stage.json").stat().st_mtime >= time else ""


def _begun(job: Job) -> float:
    """When a job started, in seconds since 1970; 0 where it never did."""
    first = next((event["time"] for event in job.events() if event["event"] == "start"), 0.0)
    return first or (job.submitted if job.log.is_file() else 0.0)


def progress(job: Job) -> str:
    """The progress of its run, as ``step 20 of 100, about 3.2 h left``; empty where it is unknown, or a later job's."""
    run, begun = Path(job.run), _begun(job)
    if not begun or any((_begun(other), other.submitted) > (begun, job.submitted) for other in jobs_of(run)):
        return ""
    if _status_since(run, begun) == "finished":
        return STAGE_FINISHED
    total, step = 0, 0
    for event in read(run):
        if event["event"] in {"start", "metrics"} and event["time"] >= begun:
            step = event.get("step", step)
            total = event.get("total", total)
    position = read_position(run)
    if position is not None and total:
        left = f", about {duration(position.seconds_left)} left" if position.seconds_left else ""
        return f"step {position.step} of {position.total}{left}"
    return f"step {step} of {total}" if total else ""


def has_ended(job: Job) -> bool:
    """Whether a job has recorded its end. One that was killed records none."""
    return any(event["event"] in END_EVENTS for event in job.events())


def outcome(job: Job) -> str:
    """How a job that runs no more has ended, from its own last event."""
    events = job.events()
    last = next((e for e in reversed(events) if e["event"] in END_EVENTS), None)
    if last is None and _cancelled(job):
        return "cancelled"
    if last is None:
        return f"{NO_RESULT}; see its log" if events or job.log.is_file() else "never started"
    return f"{last['event']}{': ' + last['reason'] if last.get('reason') else ''}"


def _cancelled(job: Job) -> bool:
    """Whether SLURM says that it cancelled a job, or, once it has forgotten the job, the last such line of the log."""
    if job.cluster != "slurm":
        return False
    with contextlib.suppress(ConfigError):
        if slurm.job_state(job.id) == "CANCELLED":
            return True
    lines = job.log.read_text(errors="replace").splitlines() if job.log.is_file() else []
    # A line with STEP in place of JOB is of a step that srun ended, as after a task that was killed.
    last = next((line for line in reversed(lines) if f"JOB {job.id} ON" in line and "CANCELLED AT" in line), "")
    return bool(last) and "DUE TO" not in last  # the time limit, preemption or a lost node
