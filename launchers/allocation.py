"""What SLURM gave this task, from the environment it set."""

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allocation:
    """One node's share of a job.

    Attributes:
        job: SLURM's number.
        restart: how often it was queued again.
        node: this node's number in it, from 0.
        nodes: how many there are.
        name: what SLURM calls this node.
        cpus: of this node.
        gpus: of this node.
    """

    job: str
    restart: int
    node: int
    nodes: int
    name: str
    cpus: int
    gpus: int

    @staticmethod
    def here() -> "Allocation":
        """The allocation of this process's task."""
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
    """What a job is to do; the same on all its nodes and after every restart.

    Attributes:
        stage: its name.
        run: its run folder, absolute.
        values: its whole configuration, with as many workers as the job asked for.
        inputs: configuration key -> path that it reads.
        chained: it is one stage of a pipeline; what is finished is not done again.
        trains: it writes checkpoints on request and goes on from them.
        nodes: how many nodes were asked for.
        place: folder that the paths are relative to.
        scratch: folder for temporary files, local to each node.
        interface: of the network between nodes; empty: that of the default route.
        signal_delay: seconds between the signal before the end and the end.
    """

    stage: str
    run: str
    values: dict[str, Any]
    inputs: dict[str, str]
    chained: bool
    trains: bool
    nodes: int
    place: str
    scratch: str
    interface: str
    signal_delay: int

    def workers(self, allocation: Allocation) -> int:
        """How many workers that allocation takes: of the number asked for, what divides the batch and has a place."""
        compute = self.values.get("compute")
        if compute is None:
            return 1
        asked = int(compute["workers"])
        if allocation.nodes >= self.nodes:
            return asked
        places = allocation.nodes * max(1, allocation.gpus)
        training = self.values.get("training")
        parts = training["batch"] // training["accumulate"] if training else 1
        return next((n for n in range(min(asked, places), 1, -1) if not training or parts % n == 0), 1)
