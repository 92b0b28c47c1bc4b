"""`submit.py status`, `logs` and `cancel`: jobs of SLURM and of this machine alike, without SLURM's accounting."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers import jobs, local, slurm
from launchers.jobs import Job
from mvhpc.config import ConfigError

POLL_S = 0.5
CANCEL_S = 120  # how long a job may take to end


def state(job: Job) -> str:
    """Whether a job waits or runs, in its cluster's words; empty where it is over.

    Raises:
        ConfigError: where that cannot be asked here.
    """
    return slurm.state(job.id) if job.cluster == "slurm" else local.state(job)


def lines(job: Job, follow: bool = True) -> Iterator[str]:
    """The lines of a job's log, as they come until it ends; submitit's own and the traceback of a failure left out."""
    position, rest, over = 0, "", False
    while not over:
        over = not follow or not state(job)
        if job.log.is_file():
            with job.log.open(errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *whole, rest = (rest + text).split("\n")
            for line in whole:
                if line.startswith("submitit ERROR"):
                    return
                if not line.startswith("submitit "):
                    yield line
        if not over:
            time.sleep(POLL_S)


def describe(job: Job) -> str:
    """How a job is, in a line's words."""
    try:
        now = state(job) or jobs.ending(job)
    except ConfigError as error:
        now = str(error)
    far = jobs.progress(job)
    return f"{now}, {far}" if far and far not in now else now


def cancel(job: Job) -> None:
    """End a job, wait until it is gone, and let go of its run.

    Raises:
        ConfigError: where it does not end.
    """
    (slurm.cancel(job.id) if job.cluster == "slurm" else local.cancel(job))
    end = time.monotonic() + CANCEL_S
    while state(job):
        if time.monotonic() > end:
            raise ConfigError(f"job {job.id} does not end; see {job.log}")
        time.sleep(POLL_S)
    if not any(event["event"] in jobs.ENDS for event in job.events()):
        job.tell("cancelled")
    (job.folder / "token").unlink(missing_ok=True)
    jobs.release(Path(job.run), job.id)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the three commands; returns the exit status.

    Raises:
        ConfigError: no such job.
    """
    parser = argparse.ArgumentParser(prog="submit.py")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="the last job of every run, or all jobs of one")
    status.add_argument("run", nargs="?", help="run folder")
    logs = commands.add_parser("logs", help="what a job printed")
    logs.add_argument("job", help="its number or run folder")
    logs.add_argument("--follow", action="store_true", help="go on until it ends")
    end = commands.add_parser("cancel", help="end a job, waiting or running")
    end.add_argument("job", help="its number or run folder")
    options = parser.parse_args(arguments)
    if options.command == "status":
        found = jobs.jobs_of(Path(options.run)) if options.run else [jobs.jobs_of(run)[-1] for run in _with_jobs()]
        for job in found:
            print(f"{job.id:>8s}  {job.cluster:5s}  {job.stage:9s}  {describe(job)}  {job.run}")
        return 0
    job = jobs.find(options.job)
    if options.command == "cancel":
        cancel(job)
        print(f"job {job.id} cancelled; submit it again to go on from its last checkpoint", file=sys.stderr)
        return 0
    try:
        for line in lines(job, options.follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    print(f"job {job.id}: {describe(job)}; more logs in {job.folder} and {job.run}/logs", file=sys.stderr)
    return 0


def _with_jobs() -> list[Path]:
    return [run for run in jobs.runs() if jobs.jobs_of(run)]
