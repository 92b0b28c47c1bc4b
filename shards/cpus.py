"""How many processor cores this process may use."""

import os
from pathlib import Path

from shards.errors import DataError


def available_cores(root: Path = Path("/")) -> int:
    """Processor cores that this process may use, at least 1.

    The least of what its CPU affinity and the CPU quotas of its control groups (versions 1 and 2) allow. A job of a
    shared SLURM node or a container has fewer than ``os.cpu_count()``, the cores of the machine.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, int(min([float(cores), *_quotas(root)])))


def worker_count(workers: int) -> int:
    """The number of workers that is given; the processor cores for 0.

    Raises:
        DataError: a negative number.
    """
    if workers < 0:
        raise DataError(f"workers {workers}: expected a number of processes, or 0 for one per core")
    return workers or available_cores()


def _quotas(root: Path) -> list[float]:
    """The CPU quotas, in cores, of this process's control groups and of those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:  # hierarchy:controllers:path; version 2 has no controllers
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / path.lstrip("/")  # in a container the path may be the host's, and only the mount exists
        for group in [folder, *folder.parents]:
            quotas += _quota(group)
            if group == mount:
                break
    return quotas


def _quota(group: Path) -> list[float]:
    """The CPU quota of one control group, in cores; nothing where it has none."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "QUOTA PERIOD" or "max PERIOD"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError):
        return []
