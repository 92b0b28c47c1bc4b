"""SLURM: what submits to it, and what it says of a job. Only its daemons are asked, never its accounting."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import submitit

from launchers.site import Site, minutes
from mvhpc.config import ConfigError

ASK_S = 30  # how long a command of SLURM's may take
# In the job's script: where the first node's supervisor (or srun) is killed, nobody else is left to ask for it. Not for
# ever, should the same kill meet every start.
AGAIN = 'trap \'[ $? -eq 137 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID"\' EXIT'
# What squeue calls a job that will do nothing more.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "REVOKED"}


def available() -> bool:
    """Whether there is a SLURM here that answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False, timeout=ASK_S).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def executor(
    folder: Path, site: Site, stage: str, nodes: int, fewest: int, gpus: int, after: str | None
) -> submitit.SlurmExecutor:
    """What submits a job with one task on each of its nodes.

    Args:
        folder: of the job's files and logs.
        site: what this SLURM wants.
        stage: for the job's name.
        nodes: how many nodes.
        fewest: with how many it may start.
        gpus: of each node.
        after: job that must have ended well before; None: none.

    Raises:
        ConfigError: where there is no SLURM.
    """
    if shutil.which("srun") is None:
        raise ConfigError("--cluster slurm: no srun and sbatch here; submit on a login node, or take --cluster local")
    submitter = submitit.SlurmExecutor(folder, python=shlex.quote(sys.executable))
    further: dict[str, Any] = {"requeue": True} | site.sbatch
    if fewest < nodes:
        further["nodes"] = f"{fewest}-{nodes}"
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
        nodes=nodes,  # and no count of tasks: SLURM would take the fewest nodes that hold them
        signal_delay_s=site.signal_delay,
        stderr_to_stdout=True,
        setup=[
            AGAIN,
            *(f"module load {shlex.quote(name)}" for name in site.modules),
            *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
            *site.setup,
        ],
        additional_parameters=further,
        **{key: value for key, value in options.items() if value},
    )
    return submitter


def script(submitter: submitit.SlurmExecutor) -> str:
    """The script that sbatch would be given."""
    return str(submitter._make_submission_file_text(submitter._submitit_command_str, "dry-run"))


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return ""
        raise ConfigError(f"{command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def state(job: str) -> str:
    """What SLURM calls a job's state, with why it waits; empty where it is over or forgotten.

    Raises:
        ConfigError: where SLURM does not answer.
    """
    word, _, reason = _ask("squeue", "--noheader", "--jobs", job, "--format=%T %r").partition(" ")
    if word in OVER:
        return ""
    return f"{word.lower()} ({reason})" if word == "PENDING" else word.lower()


def _shown(job: str, field: str) -> str:
    shown = _ask("scontrol", "--oneliner", "show", "job", job)
    fields = dict(part.partition("=")[::2] for part in shown.split() if "=" in part)
    return fields.get(field, "")


def ending(job: str) -> str:
    """SLURM's own word for a job's state, in capitals, also just after its end; empty once it is forgotten."""
    return _shown(job, "JobState")


def restarts(job: str) -> int:
    """How often a job has been taken back into the queue."""
    return int(_shown(job, "Restarts"))


def seconds_left(job: str) -> float:
    """How long its time limit still lets a running job run; infinite where SLURM does not say."""
    try:
        text = _ask("squeue", "--noheader", "--jobs", job, "--format=%L")
        days, _, clock = text.rpartition("-")
        parts = [int(p) for p in clock.split(":")]
    except (ValueError, ConfigError, OSError, subprocess.SubprocessError):
        return float("inf")
    seconds = sum(n * s for n, s in zip(reversed(parts), (1, 60, 3600)))
    return seconds + 86400 * int(days or 0)


def cancel(job: str) -> None:
    """End a job, waiting or running."""
    _ask("scancel", job)


def requeue(job: str) -> None:
    """Let a running job begin again from the queue."""
    _ask("scontrol", "requeue", job)
