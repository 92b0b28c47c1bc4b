"""Where a job of SLURM stands. Only its controller is queried, never its accounting."""

import os
import subprocess

from mvhpc.config import ConfigError

COMMAND_TIMEOUT_S = 30
TERMINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "REVOKED"}


def query(*command: str) -> str:
    """The output of a command of SLURM; empty for a job that it does not know.

    Raises:
        ConfigError: it is not here, refuses, or does not answer.
    """
    filters = ("SQUEUE_", "SINFO_")  # a user's own view, as SQUEUE_PARTITION, which would hide jobs
    environment = {name: value for name, value in os.environ.items() if not name.startswith(filters)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S
        )
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}; run this where SLURM's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: SLURM did not answer within {COMMAND_TIMEOUT_S} s; try again") from error
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return ""
        raise ConfigError(f"{command[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def state(job: str) -> str:
    """The state of a job in lower case, with the reason where it is pending; empty where it is over or forgotten.

    Raises:
        ConfigError: SLURM does not answer.
    """
    word, _, reason = query("squeue", "--noheader", "--jobs", job, "--format=%T %r").partition(" ")
    if word in TERMINAL_STATES:
        return ""
    return f"{word.lower()} ({reason})" if word == "PENDING" else word.lower()
