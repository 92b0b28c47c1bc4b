"""Fixtures of the tests on a real SLURM; a test module loads them by `pytest_plugins`."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import PROGRAMS, SlurmCluster


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster, for one session of tests."""
    os.environ["PATH"] = os.environ["PATH"] + os.pathsep + "/usr/sbin"  # where Debian installs the daemons
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, configured in this process's environment; jobs and nodes of a failed test are cleaned up."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    yield slurm_cluster
    for job in slurm_cluster.run("squeue", "--noheader", "--format=%i").split():
        slurm_cluster.run("scancel", job)
    for node, state in slurm_cluster.nodes().items():
        if "down" in state:
            slurm_cluster.up(node)
