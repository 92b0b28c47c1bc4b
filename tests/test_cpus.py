"""A process counts the cores that it may use, not those of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.cpus import available_cores

NARROWED = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from shards.cpus import available_cores
print(available_cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_narrows_the_count() -> None:
    done = subprocess.run([sys.executable, "-c", NARROWED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def cgroup(root: Path, line: str, files: dict[str, str]) -> None:
    """What ``/proc/self/cgroup`` and ``/sys/fs/cgroup`` hold."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/job", {"job/cpu.max": "150000 100000"}),
        ("0::/job/step", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}),  # of the group above
        ("0::/", {"cpu.max": "100000 100000"}),  # a container with a view of its own
        ("0::/", {"cpu.max": "20000 100000"}),  # less than one core is one
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}),
        ("4:cpu,cpuacct:/of/host", {"cpu,cpuacct/cpu.cfs_quota_us": "5000", "cpu,cpuacct/cpu.cfs_period_us": "5000"}),
    ],
)  # fmt: skip
def test_a_quota_of_one_core_is_one_core(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    cgroup(tmp_path, line, files)
    assert available_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/job", {"job/cpu.max": "max 100000"}),
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}),
        ("9:memory:/job", {"memory/job/cpu.max": "100000 100000"}),  # not the controller of the CPU
        ("0::/gone", {}),
    ],
)
def test_without_a_quota_affinity_alone_counts(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    cgroup(tmp_path, line, files)
    assert available_cores(tmp_path) == len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
