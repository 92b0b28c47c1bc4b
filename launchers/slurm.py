"""SLURM: submission, and what it does with a job; see :mod:`mvhpc.runs.squeue`."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.process import PYTHON
from launchers.site import Site, minutes
from mvhpc.config import ConfigError
from mvhpc.runs.squeue import COMMAND_TIMEOUT_S, query
from mvhpc.runtime.importing import require

if TYPE_CHECKING:
    import submitit

# In the job's script: where the supervisor of the first node (or srun) is killed, the script requeues the job. The
# number of restarts is limited, should the same kill meet each of them.
REQUEUE_WHEN_KILLED = (
    'trap \'[ $? -eq 137 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID"\' EXIT'
)
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}  # where SLURM is, not what this process may use of it


def available() -> bool:
    """Whether a SLURM controller answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        command = ["sinfo", "--noheader"]
        return subprocess.run(command, capture_output=True, check=False, timeout=COMMAND_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def executor(
    folder: Path, site: Site, stage: str, nodes: int, min_nodes: int, gpus: int, after: str | None
) -> "submitit.SlurmExecutor":
    """Submits a job with one task on each of its nodes.

    Args:
        folder: for the job's files and logs.
        site: the site's settings.
        stage: for the job's name.
        nodes: number of nodes.
        min_nodes: number of nodes that the job may start with.
        gpus: GPUs of each node.
        after: job that must have succeeded before; None: none.

    Raises:
        ConfigError: there is no SLURM.
    """
    if shutil.which("srun") is None:
        raise ConfigError("--cluster slurm: no srun and sbatch here; submit on a login node, or take --cluster local")
    require("cluster", "submit.py", "submitit")
    import submitit

    submitter = submitit.SlurmExecutor(folder, python=PYTHON)
    further: dict[str, Any] = {"requeue": True} | site.sbatch
    if min_nodes < nodes:
        further["nodes"] = f"{min_nodes}-{nodes}"
    if after:
        further |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options: dict[str, Any] = {
        "partition": site.partition,
        "account": site.account,
        "mem": site.memory,
        "gpus_per_node": gpus,
        "cpus_per_task": site.cpus_per_task,
    }
    submitter.update_parameters(
        job_name=f"mvhpc-{stage}",
        time=minutes(site.time),
        nodes=nodes,  # without a number of tasks, or SLURM takes the fewest nodes that hold them
        signal_delay_s=site.signal_delay,
        stderr_to_stdout=True,
        setup=[
            REQUEUE_WHEN_KILLED,
            *(f"module load {shlex.quote(name)}" for name in site.modules),
            *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
            *site.setup,
        ],
        additional_parameters=further,
        **{key: value for key, value in options.items() if value},
    )
    return submitter


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Without the variables of the SLURM job that this process runs in, if any, while the block lasts.

    ``sbatch`` takes them for options, and hands them on to the new job, whose ``srun`` does the same.
    """
    inherited = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("SLURM_", "SRUN_")) and name not in KEPT
    }
    try:
        yield
    finally:
        os.environ.update(inherited)


def submit(submitter: "submitit.SlurmExecutor", function: Callable[..., None], *arguments: Any) -> str:
    """Hand a call to sbatch, and return the number of the job.

    Raises:
        ConfigError: SLURM refuses it; the message is sbatch's own, in one line.
    """
    from submitit.core.utils import FailedJobError

    try:
        with outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return str(submitter.submit(function, *arguments).job_id)
    except FailedJobError as error:
        lines = [line.removeprefix("sbatch:").removeprefix(" error:").strip() for line in str(error).splitlines()]
        known = ""
        if "partition" in str(error).lower():
            known = f" (partitions here: {', '.join(sorted(set(query('sinfo', '--noheader', '--format=%R').split())))})"
        raise ConfigError(f"sbatch refused the job: {'; '.join(filter(None, lines))}{known}") from error


def nodes_of(partition: str) -> int:
    """Number of nodes of a partition, or of the largest of several (``a,b``); 0 where it cannot be found out.

    Args:
        partition: its name; empty: the site's default.
    """
    with contextlib.suppress(ValueError):  # a ConfigError too
        rows = [line.split() for line in query("sinfo", "--noheader", "--format=%P %D").splitlines()]
        names = partition.split(",") if partition else [name[:-1] for name, _ in rows if name.endswith("*")]
        return max(sum(int(count) for name, count in rows if name.rstrip("*") == wanted) for wanted in names)
    return 0


def script(submitter: "submitit.SlurmExecutor") -> str:
    """The script that is handed to sbatch."""
    return str(submitter._make_submission_file_text(submitter._submitit_command_str, "dry-run"))


def _field(job: str, name: str) -> str:
    shown = query("scontrol", "--oneliner", "show", "job", job)
    fields = dict(part.partition("=")[::2] for part in shown.split() if "=" in part)
    return fields.get(name, "")


def job_state(job: str) -> str:
    """SLURM's own word for a job's state, in capitals, also just after its end; empty once it is forgotten."""
    return _field(job, "JobState")


def restarts(job: str) -> int:
    """How often a job has been requeued."""
    return int(_field(job, "Restarts"))


def seconds_left(job: str) -> float:
    """Seconds until the time limit of a running job; infinite where it is unknown."""
    try:
        text = query("squeue", "--noheader", "--jobs", job, "--format=%L")
        days, _, clock = text.rpartition("-")
        parts = [int(p) for p in clock.split(":")]
    except ValueError:  # a ConfigError too
        return float("inf")
    seconds = sum(n * s for n, s in zip(reversed(parts), (1, 60, 3600)))
    return seconds + 86400 * int(days or 0)


def dependants(job: str) -> list[str]:
    """The pending jobs that a job's end in failure takes with it: those that wait for it, and those behind them."""
    waits = {}
    for line in query("squeue", "--noheader", "--format=%i %E").splitlines():
        number, _, condition = line.partition(" ")
        waits[number] = set(re.findall(r"afterok:(\d+)", condition))
    found = [job]
    for number in found:  # which grows
        found += [other for other, before in waits.items() if number in before and other not in found]
    return found[1:]


def cancel(job: str) -> None:
    """Cancel a pending or running job."""
    query("scancel", job)


def requeue(job: str) -> None:
    """Put a running job back into the queue."""
    query("scontrol", "requeue", job)
