"""Jobs of an earlier submission that wait or run: a new one may not change what they work with."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers import jobs, jobs_cli
from launchers.jobs import PROG, Job
from launchers.plan import Step
from mvhpc.config import ConfigError, flatten
from mvhpc.runs.folder import check_idle
from mvhpc.runs.holder import assignment, read_paths, run_folders
from mvhpc.runs.mlflow_store import SQLITE

NAMED = 4  # differences in one message


def check_steps(steps: Sequence[Step], root: Path | None, on_slurm: bool) -> None:
    """Check all steps of a submission before the first of them is submitted.

    Args:
        steps: of the submission.
        root: of their project; None: they have none.
        on_slurm: whether it is for SLURM; else for this machine.

    Raises:
        ConfigError: a job that is pending or running holds the run folder of a step and has other values, or is one
            that SLURM cannot wait for, or reads a result that would be made anew; a process is at a step; or the step
            is no stage of a pipeline, which is submitted once.
    """
    runs = [*jobs.registered_runs(), *(run_folders(root) if root else ())]
    held = [job for run in runs if (job := jobs.holder_of(run))]
    at_work = [(job, read_paths(Path(job.run), job.id)) for job in held]
    for step in steps:
        holder = jobs.holder_of(step.run)
        if holder is not None and (now := jobs_cli.state(holder)):
            check_holder(step, holder, now)
            if on_slurm and holder.cluster == "local":
                raise ConfigError(
                    f"{step.stage}: job {holder.id} ({now}) is a process, which no job of SLURM can wait for; "
                    f"{_remedy(holder)}"
                )
        elif not step.finished:
            check_idle(step.run)
            path = Path(step.config.out).resolve()
            for job in (job for job, paths in at_work if path in paths):
                if now := jobs_cli.state(job):
                    raise ConfigError(
                        f"{job.stage}: job {job.id} ({now}) works with {path}, which stage {step.stage} would make "
                        f"anew; {_remedy(job)}"
                    )


def check_holder(step: Step, holder: Job, now: str) -> None:
    """Check that a step may leave its work to the job that holds its run folder.

    Raises:
        ConfigError: the step is no stage of a pipeline, or the job has other values.
    """
    if not step.chained:
        raise ConfigError(
            f"{step.run} is held by job {holder.id} ({now}), submitted on {holder.host}; see `{PROG} logs "
            f"{holder.id}`, or end it with `{PROG} cancel {holder.id}`"
        )
    if found := list(_differences(step, holder)):
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise ConfigError(
            f"{step.stage}: job {holder.id} ({now}) has other values: {', '.join(found[:NAMED])}{more}; "
            f"{_remedy(holder)}"
        )


def _remedy(holder: Job) -> str:
    return f"wait for its end, or end it with `{PROG} cancel {holder.id}`, and submit again"


def _differences(step: Step, holder: Job) -> Iterator[str]:
    """``key there A, now B`` of each value; nothing of a job that was submitted before values were recorded."""
    there = assignment(Path(holder.run), holder.id)
    if not there:
        return
    if step.nodes != there["nodes"]:
        yield f"nodes there {there['nodes']}, now {step.nodes}"
    old, new = flatten(there["values"]), flatten(step.values())
    for key in [*new, *(old.keys() - new.keys())]:
        before, after = old.get(key), new.get(key)
        if before != after and _absolute(before, there["cwd"]) != _absolute(after, str(Path.cwd())):
            yield f"{key} there {_shown(before)}, now {_shown(after)}"


def _absolute(value: Any, folder: str) -> Any:
    """A path, or the address of a store, without links, as two spellings of it are one."""
    return os.path.realpath(Path(folder, value.removeprefix(SQLITE))) if isinstance(value, str) and value else value


def _shown(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
