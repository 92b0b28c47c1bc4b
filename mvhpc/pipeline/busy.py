"""Jobs and processes at work in a project: a command does not change what they work with."""

from collections.abc import Iterable
from pathlib import Path

from mvhpc.config import ConfigError
from mvhpc.execute import PlannedStage
from mvhpc.runs.folder import check_idle
from mvhpc.runs.holder import holder, read_paths, run_folders, state

NAMED = 5  # jobs in one message


def check_project(root: Path, stages: Iterable[Path]) -> None:
    """Check that nothing is at work in a whole project.

    Args:
        root: of the project.
        stages: the run folders of its stages.

    Raises:
        ConfigError: a process is, or jobs are pending or running.
    """
    _check_jobs(run_folders(root))
    for folder in stages:
        check_idle(folder)


def check_stage(planned: PlannedStage, root: Path | None) -> None:
    """Check that no job is to make the result of a stage, or to read it; a complete result is reused anyway.

    Args:
        planned: the stage, which is about to run.
        root: of its project; None: it has none.

    Raises:
        ConfigError: there is one.
    """
    if planned.state() == "finished":
        return
    out = planned.out.resolve()
    others = run_folders(root) if root else ()
    _check_jobs(
        [planned.folder, *(run for run in others if (job := holder(run)) and out in read_paths(run, job["id"]))]
    )


def _check_jobs(runs: Iterable[Path]) -> None:
    found: dict[str, str] = {}  # number of a job -> what it does
    held = [(job, run) for run in runs if (job := holder(run))]
    for job, run in sorted(held, key=lambda pair: pair[0]["submitted"]):  # the first of a chain first
        try:
            now = state(job)
        except ConfigError as error:
            raise ConfigError(
                f"{run} is held by job {job['id']}: {error} (if it has ended, remove {run / 'jobs' / 'lock'})"
            ) from error
        if now:
            found.setdefault(job["id"], f"{job['id']} ({job['stage']}, {now})")
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise ConfigError(
            f"jobs are at work here, or wait: {', '.join([*found.values()][:NAMED])}{more}; wait for their end, or "
            f"end them with `mvhpc submit cancel {next(iter(found))}` and so on"
        )
