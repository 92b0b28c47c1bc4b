"""What SLURM allocated to this task, and what the job is to do."""

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allocation:
    """One node's share of a job.

    Attributes:
        job: SLURM's job number.
        restart: how often the job has been requeued.
        node: index of this node within the job, from 0.
        nodes: number of nodes of the job.
        name: SLURM's name of this node.
        cpus: CPUs on this node.
        gpus: GPUs on this node.
    """

    job: str
    restart: int
    node: int
    nodes: int
    name: str
    cpus: int
    gpus: int

    @staticmethod
    def from_environment() -> "Allocation":
        """The allocation of this task, from the variables that SLURM sets."""
        get = os.environ.get
        node = int(get("SLURM_NODEID", "0"))
        gpus = get("SLURM_GPUS_ON_NODE") or str(
            len([g for g in get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()])
        )
        return Allocation(
            job=os.environ["SLURM_JOB_ID"],
            restart=int(get("SLURM_RESTART_COUNT", "0")),
            node=node,
            nodes=int(get("SLURM_JOB_NUM_NODES", get("SLURM_NNODES", "1"))),
            name=get("SLURMD_NODENAME", f"node {node}"),
            cpus=int(get("SLURM_CPUS_ON_NODE", "1")),
            gpus=int(gpus) if gpus.isdigit() else 0,
        )


@dataclass(frozen=True)
class Assignment:
    """What a job is to do; the same on all of its nodes and after every restart.

    Attributes:
        stage: name of the stage.
        run: its run folder, absolute.
        values: its complete configuration, for the number of workers that was requested.
        inputs: configuration key -> paths that the stage reads.
        chained: the stage is one of a pipeline; it is skipped where it is complete.
        trains: the stage writes checkpoints on request and resumes from them.
        nodes: number of nodes that was requested.
        cwd: folder that relative paths start from.
        scratch: folder for temporary files, local to each node; empty: see :func:`mvhpc.runtime.scratch.short_parent`.
        interface: network interface between nodes; empty: that of the default route.
        signal_delay: seconds between the warning signal and the end of the job.
    """

    stage: str
    run: str
    values: dict[str, Any]
    inputs: dict[str, list[str]]
    chained: bool
    trains: bool
    nodes: int
    cwd: str
    scratch: str
    interface: str
    signal_delay: int

    def workers(self, allocation: Allocation) -> int:
        """Number of workers for an allocation.

        With fewer nodes than requested, it is the largest number that has room there and divides the batch.
        """
        requested = int(self.values.get("compute", {}).get("workers", 1))  # a stage of one process has no such key
        if allocation.nodes >= self.nodes:
            return requested
        slots = allocation.nodes * max(1, allocation.gpus)
        training = self.values.get("training")
        parts = training["batch"] // training["accumulate"] if training else 1
        return next((n for n in range(min(requested, slots), 1, -1) if not training or parts % n == 0), 1)
