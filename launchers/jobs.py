"""The jobs of a run, as its folder knows them: who works on it now, and what became of those before.

    RUN/jobs/lock           the job that may write to the run; absent: none
    RUN/jobs/JOB/job.json   what was submitted, where and by which code
    RUN/jobs/JOB/journal.jsonl   what befell it: start, boot, train, requeue, end ...

Nothing here asks SLURM's accounting, which many sites do not run.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvhpc.config import CONFIGS, ConfigError
from mvhpc.runs.folder import read_record
from mvhpc.runs.journal import Journal, read
from shards.files import write_text

SILENT = "ended without a word"
ENDS = {"finished", "failed", "cancelled", "stopped"}  # events after which a job does nothing more


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        run: its run folder, absolute.
        id: SLURM's, or the process number of a local one.
        cluster: ``slurm`` or ``local``.
        stage: what it does.
        nodes: how many it asked for.
        host: where it was submitted.
        submitted: when, in seconds since 1970.
        born: when a local job's process began, which tells it from later ones of its number; 0 for SLURM.
    """

    run: str
    id: str
    cluster: str
    stage: str
    nodes: int
    host: str
    submitted: float
    born: float = 0.0

    @property
    def folder(self) -> Path:
        """What it wrote beside its log."""
        return Path(self.run) / "jobs" / self.id

    @property
    def log(self) -> Path:
        """What it printed; of SLURM jobs what node 0 did."""
        return Path(self.run) / "jobs" / f"{self.id}_0_log.out"

    def save(self) -> None:
        """Write ``job.json``, and beside it the state of the code that was submitted."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        commit, diff = code_state()
        about = {**dataclasses.asdict(self), "commit": commit, "dirty": bool(diff)}
        write_text(self.folder / "code.diff", diff)
        write_text(self.folder / "job.json", json.dumps(about, indent=1))
        remember(Path(self.run))

    def tell(self, event: str, **fields: Any) -> None:
        """Journal what befell it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        Journal(self.folder).write(event, **fields)

    def events(self) -> list[dict[str, Any]]:
        """What befell it so far."""
        return read(self.folder)


def submitted(run: Path, job: str, cluster: str, stage: str, nodes: int, born: float = 0.0) -> Job:
    """A job that was submitted just now."""
    return Job(str(run.absolute()), job, cluster, stage, nodes, socket.gethostname(), round(time.time(), 1), born)


def jobs_of(run: Path) -> list[Job]:
    """All jobs of a run folder, oldest first."""
    names = [f.name for f in dataclasses.fields(Job)]
    found = []
    for path in (run / "jobs").glob("*/job.json"):
        about = json.loads(path.read_text())
        found.append(Job(**{k: about[k] for k in names} | {"run": str(run.absolute())}))
    return sorted(found, key=lambda job: job.submitted)


def code_state() -> tuple[str, str]:
    """(commit, all that differs from it) of the code; empty where it is not in git."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(CONFIGS.parent), *arguments], capture_output=True, text=True, check=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout

    return git("rev-parse", "HEAD").strip(), git("status", "--short") + git("diff", "HEAD")


# --- the lock ---


class Lock:
    """Says which job may write to a run. Asked and changed under a lock of the file system, by :func:`locked` alone."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        text = os.pread(descriptor, 2**16, 0).decode()
        self.holder = Job(**json.loads(text)) if text else None

    def give(self, job: Job | None) -> None:
        """Make ``job`` the holder; None: nobody."""
        self.holder = job
        if job is None:
            self._path.unlink()
            return
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(dataclasses.asdict(job)).encode(), 0)
        os.fsync(self._descriptor)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[Lock]:
    """The lock of a run folder, for as long as it takes to look at it or to change it."""
    path = run / "jobs" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:  # else it was removed while we waited
                    lock = Lock(path, descriptor)
                    try:
                        yield lock
                    finally:
                        if lock.holder is None:
                            path.unlink(missing_ok=True)
                    return
        finally:
            os.close(descriptor)


def release(run: Path, job: str) -> None:
    """Let go of a run, where the job with that number holds it."""
    if (run / "jobs" / "lock").exists():
        with locked(run) as lock:
            if lock.holder is not None and lock.holder.id == job:
                lock.give(None)


# --- where this user's runs are ---


def _registry() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mvhpc" / "runs"


def remember(run: Path) -> None:
    """Note that there is such a run folder."""
    path, line = _registry(), f"{run.absolute()}"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if line not in (path.read_text().splitlines() if path.is_file() else []):
        with path.open("a") as file:
            file.write(line + "\n")


def runs() -> list[Path]:
    """The run folders of this user that jobs were submitted for and that are still there."""
    path = _registry()
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Path(line) for line in lines if (Path(line) / "jobs").is_dir()]


def find(word: str) -> Job:
    """The job of an id, or the latest one of a run folder.

    Raises:
        ConfigError: where there is none.
    """
    if Path(word).is_dir() or "/" in word:
        found = jobs_of(Path(word))
        if not found:
            raise ConfigError(f"{word} is no run folder with jobs; give a job's number or `submit.py status`")
        return found[-1]
    found = [job for run in runs() for job in jobs_of(run) if job.id == word]
    if not found:
        raise ConfigError(f"no job {word} among the runs submitted from here; `submit.py status` lists them")
    return max(found, key=lambda job: job.submitted)


# --- how far a job is ---


def progress(job: Job) -> str:
    """How far its run is, in words; empty where nothing says so."""
    mark = read_record(Path(job.run))
    if mark.get("status") == "finished":
        return "stage finished"
    total, step = 0, 0
    for event in read(Path(job.run)):
        if event["event"] in {"start", "metrics"}:
            step = event.get("step", step)
            total = event.get("total", total)
    return f"step {step} of {total}" if total else ""


def ending(job: Job) -> str:
    """What its own last event says; ``ended without a word`` where it says of no end."""
    events = job.events()
    last = next((e for e in reversed(events) if e["event"] in ENDS), None)
    if last is None:
        return SILENT if events else "never started"
    return f"{last['event']}{': ' + last['why'] if last.get('why') else ''}"
