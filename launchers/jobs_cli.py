"""`mvhpc submit status`, `logs` and `cancel`, for SLURM and local jobs alike."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers import jobs, local, slurm
from launchers.jobs import Job
from mvhpc.checkpoints.manifest import complete
from mvhpc.config import ConfigError
from mvhpc.runs import holder
from mvhpc.stages import STAGES

POLL_S = 0.5
CANCEL_TIMEOUT_S = 120


def state(job: Job) -> str:
    """``pending (reason)``, ``running`` or another state of its cluster; empty where the job is over.

    Raises:
        ConfigError: the state cannot be found out from here.
    """
    return holder.state(dataclasses.asdict(job))


def goes_on(job: Job) -> bool:
    """Whether a job is pending or running; where that cannot be found out, whether it has recorded no end yet."""
    try:
        return bool(state(job))
    except ConfigError:
        return not jobs.has_ended(job)


def log_lines(job: Job, follow: bool = True) -> Iterator[str]:
    """The lines of a job's log, without those of submitit itself and its traceback of a failure.

    Args:
        job: the job.
        follow: go on until the job ends.
    """
    position, rest, over = 0, "", False
    while not over:
        over = not follow or not goes_on(job)
        if job.log.is_file():
            with job.log.open(errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *lines, rest = (rest + text).split("\n")
            if over and rest:
                lines.append(rest)
            for line in lines:
                if line.startswith("submitit ERROR"):
                    return
                if not line.startswith("submitit "):
                    yield line
        if not over:
            time.sleep(POLL_S)


def describe(job: Job) -> str:
    """State or outcome of a job, and its progress, in one line."""
    try:
        now = state(job) or jobs.outcome(job)
    except ConfigError as error:
        now = jobs.outcome(job) if jobs.has_ended(job) else f"unknown ({error})"
    now = "; ".join(line.strip() for line in now.splitlines() if line.strip()).replace(":; ", ": ")
    progress = (jobs.phase(job) if now == "running" else "") or jobs.progress(job)
    if progress == jobs.STAGE_FINISHED and now.startswith(("pending", "failed", "cancelled", "stopped")):
        return now
    if now != "running":
        progress = progress.partition(", about ")[0]  # nothing is left to wait for
    return f"{now}, {progress}" if progress and progress not in now else now


def cancel_chain(job: Job) -> list[Job]:
    """End a job and those that wait for it, and return those that were not over yet.

    SLURM would end the latter a little later; until then they would hold their runs.
    """
    numbers = slurm.dependants(job.id) if job.cluster == "slurm" else []
    mine = [other for run in jobs.registered_runs() for other in jobs.jobs_of(run)] if numbers else []
    known = {other.id: other for other in mine if other.cluster == "slurm"}  # local ones are processes
    going = [other for other in (job, *(known[number] for number in numbers if number in known)) if state(other)]
    for ended in going:
        cancel(ended)
    _free(job)
    return going


def restart(job: Job) -> str:
    """What another submission of a job that was ended does."""
    if STAGES[job.stage].trains and complete(Path(job.run) / "checkpoints"):
        return "submit it again to resume from its last checkpoint"
    return f"submitted again, it {'goes on with what is done' if STAGES[job.stage].resumes else 'begins anew'}"


def cancel(job: Job) -> None:
    """End a job, wait until it is gone, and free its run.

    Raises:
        ConfigError: it does not end within the time limit.
    """
    (slurm.cancel(job.id) if job.cluster == "slurm" else local.cancel(job))
    end = time.monotonic() + CANCEL_TIMEOUT_S
    while state(job):
        if time.monotonic() > end:
            raise ConfigError(f"job {job.id} did not end within {CANCEL_TIMEOUT_S} s; see {job.log}")
        time.sleep(POLL_S)
    if not jobs.has_ended(job):
        job.record("cancelled")
    _free(job)


def _free(job: Job) -> None:
    """Free the run of a job that is over; one that was killed still holds it."""
    (job.folder / "token").unlink(missing_ok=True)
    jobs.release(Path(job.run), job.id)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the three commands; returns the exit status.

    Raises:
        ConfigError: there is no such job.
    """
    parser = argparse.ArgumentParser(prog=jobs.PROG)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="show the last job of every run, or all jobs of a folder")
    status.add_argument("run", nargs="?", help="run folder, or that of a project")
    logs = commands.add_parser("logs", help="show a job's output")
    logs.add_argument("job", help="job number or run folder")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    end = commands.add_parser("cancel", help="end a pending or running job")
    end.add_argument("job", help="job number or run folder")
    options = parser.parse_args(arguments)
    if options.command == "status":
        found = (
            jobs.jobs_below(Path(options.run))
            if options.run
            else [of_run[-1] for run in jobs.registered_runs() if (of_run := jobs.jobs_of(run))]
        )
        for job in found:
            print(f"{job.id:>8s}  {job.cluster:5s}  {job.stage:9s}  {describe(job)}  {job.run}")
        return 0
    job = jobs.find_job(options.job)
    if options.command == "cancel":
        ended = cancel_chain(job)
        behind = ", ".join(f"{other.id} ({other.stage})" for other in ended if other != job)
        also = f", and with it those that waited for it: {behind}" if behind else ""
        what, then = ("cancelled", restart(job)) if job in ended else ("was over", describe(job))
        print(f"job {job.id} {what}{also}; {then}", file=sys.stderr)
        return 0
    try:
        for line in log_lines(job, options.follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    print(f"job {job.id}: {describe(job)}; more logs in {job.folder} and {job.run}/logs", file=sys.stderr)
    return 0
