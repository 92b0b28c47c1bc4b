"""This machine as a cluster of one node: a job is a process that submitit starts here."""

import os
import sys
from pathlib import Path

import submitit

from mvhpc.config import ConfigError

MINUTES = 7 * 24 * 60  # submitit ends a job after a few minutes where no limit is set


def check(nodes: int) -> None:
    """Whether this machine can give that many nodes.

    Raises:
        ConfigError: more than one.
    """
    if nodes != 1:
        raise ConfigError(
            f"--nodes {nodes}: the local cluster is this one machine; take --nodes 1 and set compute.workers instead"
        )


def executor(folder: Path, nodes: int) -> submitit.LocalExecutor:
    """What submits to this machine, with its job files in ``folder`` and all the GPUs this process may use."""
    check(nodes)
    gpus = _gpus()
    submitter = submitit.LocalExecutor(folder)
    submitter.update_parameters(timeout_min=MINUTES, gpus_per_node=len(gpus), visible_gpus=gpus, stderr_to_stdout=True)
    return submitter


def script(folder: Path, nodes: int) -> str:
    """The command that a submitted job is."""
    check(nodes)
    return f"{sys.executable} -u -m submitit.core._submit {folder}"


def _gpus() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(gpu) for gpu in visible.split(",") if gpu.isdigit()]
    import torch

    return list(range(torch.cuda.device_count()))
