"""Faults of training on two nodes of a SLURM cluster: processes, nodes, the job."""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from benchmarks.faults.trials import RECOVERY_S, Fault, apply, audit, keys, record_verdict
from mvhpc.runtime.scratch import RANDOM, short_parent
from tests.slurm_cluster import SlurmCluster
from tests.test_slurm import check_cleaned_up, submit
from tests.test_slurm_faults import (
    Training,
    driver_killed,
    head_killed,
    out_of_time,
    preempted,
    supervisor_killed,
    worker_killed,
)

STEPS = 240  # whole epochs, and enough for every fault once


def of_node(training: Training, title: str, number: int) -> psutil.Process:
    """The oldest of the job's processes on one of its nodes, by a part of its command line."""
    found = []
    for process in training.slurm.job_processes(training.job):
        with contextlib.suppress(psutil.Error):
            named = title in " ".join(process.cmdline()) and process.name() != "srun"
            if named and process.environ().get("SLURM_NODEID") == str(number):
                found.append(process)
    assert found, f"no {title} on node {number}"
    return min(found, key=lambda process: (process.create_time(), process.pid))


def raylet_killed(training: Training) -> None:
    of_node(training, "raylet/raylet", 1).send_signal(signal.SIGKILL)


def other_supervisor_killed(training: Training) -> None:
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    of_node(training, "submitit.core._submit", 1).send_signal(signal.SIGKILL)
    slurm.start_again(training.job, restarts + 1)


def srun_killed(training: Training) -> None:
    """The srun that started the supervisors, not the process that it forks for cleaning up."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    sruns = [p for p in slurm.job_processes(training.job) if p.name() == "srun"]
    (first,) = [p for p in sruns if p.parent() not in sruns]
    first.send_signal(signal.SIGKILL)
    slurm.start_again(training.job, restarts + 1)


def node_down(training: Training) -> None:
    """One of the job's nodes is set to DOWN; SLURM requeues the job on other nodes."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    nodes = slurm.run("squeue", "--noheader", "--jobs", training.job, "--format=%N")
    node = random.choice(slurm.run("scontrol", "show", "hostnames", nodes).split())
    slurm.down(node)
    try:
        slurm.start_again(training.job, restarts + 1)
    finally:
        slurm.up(node)


SLURM: dict[str, Callable[[Training], None]] = {
    "worker killed": worker_killed,
    "head killed": head_killed,
    "raylet killed": raylet_killed,
    "driver killed": driver_killed,
    "supervisor killed": other_supervisor_killed,
    "first supervisor killed": supervisor_killed,
    "srun killed": srun_killed,
    "node down": node_down,
    "preempted": preempted,
    "out of time": out_of_time,
}


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[SlurmCluster]:
    """A running cluster; this process's environment refers to it."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian keeps the daemons
    os.environ["XDG_STATE_HOME"] = str(root / "state")  # keeps these runs out of the user's job notes
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=short_parent(len("/chaos-") + RANDOM)))
    slurm = SlurmCluster(folder)
    os.environ["SLURM_CONF"] = slurm.environment["SLURM_CONF"]
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder)


def start(slurm: SlurmCluster, root: Path, run: Path, zero: int) -> Training:
    """Submit the joint stage to two nodes, or submit it again."""
    overrides = keys(
        root, run, STEPS, f"compute.zero_stage={zero}", "compute.retries=20", "training.checkpoint_every=10"
    )
    job = submit("--stage", "joint", "--nodes", "2", "--time", "60", *overrides).stdout.strip()
    return Training(slurm, run, job)


def reference_run(slurm: SlurmCluster, root: Path, zero: int) -> Path:
    """A run without faults, made once."""
    run = root / "whole" / f"zero-{zero}" / "joint"
    if not (run / "stage.json").is_file() or '"finished"' not in (run / "stage.json").read_text():
        slurm.wait(start(slurm, root, run, zero).job, "COMPLETED", seconds=600)
    return run


def on_slurm(
    slurm: SlurmCluster, root: Path, name: str, zero: int, seed: int, kinds: list[str], draw: random.Random,
    deadline: float,
) -> list[Fault]:  # fmt: skip
    """One run under these faults, until its steps or the time end, compared with a reference run."""
    faults: list[Fault] = []
    whole = reference_run(slurm, root, zero)
    training = start(slurm, root, root / name / "joint", zero)
    try:
        training.reach(1, RECOVERY_S)
        for kind in kinds:
            target = training.step() + draw.randrange(2, 16)
            if time.monotonic() > deadline or target > STEPS - 40:
                break
            training.reach(target, RECOVERY_S)
            fault = Fault(kind, "slurm", zero, seed, name, training.step(), 0.0)
            faults.append(fault)
            if not apply(fault, training, partial(act, training, kind), True):
                state = slurm.state(training.job)
                fault.note = f"{fault.note} (the job is {state or 'forgotten'})"
                if state in {"RUNNING", "PENDING", "COMPLETING"}:
                    break
                training = start(slurm, root, training.run, zero)  # as a user would
                training.reach(target + 1, RECOVERY_S)
            print(f"{name}: {kind} at step {fault.step}: {fault.seconds} s {fault.note}", flush=True)
        state = slurm.wait(training.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "", seconds=600)
        assert state in {"COMPLETED", ""}, f"the job is {state}"
        record_verdict(faults, *audit(training.run, whole))
        check_cleaned_up(slurm, training.job, training.run)
    except (AssertionError, OSError) as error:
        record_verdict(faults, 0, f"the run did not finish well: {error}"[:300])
        with contextlib.suppress(AssertionError):
            slurm.run("scancel", training.job)
    return faults


def act(training: Training, kind: str) -> float:
    """Inject the fault; the time at which it began."""
    when = time.time()
    SLURM[kind](training)
    return when
