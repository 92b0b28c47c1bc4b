"""Jobs on a real SLURM, from submission to their end: locks, logs, preflight, cancellation, and complete cleanup."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from launchers import jobs
from launchers.allocation import Allocation, Assignment
from launchers.process import ManagedProcess
from launchers.site import load_site, minutes
from mvhpc.config import ConfigError, load_config, to_dict
from mvhpc.data_stages import PackConfig
from mvhpc.runs.folder import read_record
from mvhpc.runs.squeue import state
from mvhpc.runtime.scratch import LOCK, PREFIX
from shards.index import Index
from tests.slurm_cluster import SlurmCluster, wait_for

pytest_plugins = ["tests.slurm_fixtures", "tests.first_stages"]
SUBMIT = Path(__file__).resolve().parent.parent / "launchers" / "submit.py"


@pytest.fixture(autouse=True)
def separate_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep these runs out of the user's list of runs; no temporary folder of a dead process of their jobs is left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = set(Path("/tmp").iterdir())
    yield
    left = set(Path("/tmp").iterdir()) - before
    assert not [p for p in left if p.name.startswith("ray")]
    jobs = {script.name.partition("_")[0] for script in tmp_path.rglob("jobs/*_submission.sh")}
    ours = [p for p in left if p.name.startswith(PREFIX) and p.name.removeprefix(PREFIX).partition("-")[0] in jobs]
    assert not [p for p in ours if is_orphaned(p / LOCK)]


def is_orphaned(file: Path) -> bool:
    """Whether the process that owns a temporary folder is dead; other tests may run at the same time."""
    try:
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return file.parent.exists()  # it may have been removed just now
    except BlockingIOError:
        return False
    return True


def submit(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run submit.py, and check its exit status."""
    done = subprocess.run([sys.executable, str(SUBMIT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def check_cleaned_up(slurm: SlurmCluster, job: str, run: Path) -> None:
    """Check that no process, temporary folder, secret or lock of a job outlives it."""
    slurm.wait(job)  # a job that is cancelled while it starts has no process yet
    wait_for(lambda: not slurm.job_processes(job), 30, f"left: {slurm.job_processes(job)}")
    assert not list(Path("/tmp").glob(f"{PREFIX}{job}-*"))
    with jobs.locked(run) as lock:
        assert lock.holder is None
    assert not (run / "jobs" / job / "token").exists()


@pytest.mark.slow
def test_a_job_from_its_submission_to_its_end(slurm: SlurmCluster, tiny_bids: Path, tmp_path: Path) -> None:
    """Dry run, hold, refusal of a second job, run, logs; without accounting, also once SLURM has forgotten the job."""
    site = tmp_path / "site.yaml"
    site.write_text("time: '0:10:00'\nsbatch: {hold: true}\nenvironment: {NOTE: two words}\n")
    out, run = tmp_path / "packed", tmp_path / "packed.run"
    keys = [f"source={tiny_bids}", f"out={out}", "spacing=8.0", "shape=[16,16,16]", "workers=1", "keep_suspect=true"]
    stage = ["--stage", "pack", "--config", "demo", "--cluster-config", str(site), *keys]

    shown = submit(*stage, "--dry-run").stdout
    assert yaml.safe_load(shown) == to_dict(load_config(PackConfig, "pack", "demo", keys))
    for line in ("#SBATCH --time=10", "export NOTE='two words'", "#SBATCH --hold", "#SBATCH --requeue"):
        assert line in shown
    assert not run.exists()

    job = submit(*stage).stdout.strip()
    assert f"held by job {job} (pending" in submit(*stage, status=2).stderr
    assert "pending" in submit("status").stdout
    slurm.run("scontrol", "release", job)
    slurm.wait(job, "RUNNING")
    assert f"held by job {job}" in submit(*stage, status=2).stderr
    followed = submit("logs", job, "--follow")
    assert f"job {job} finished" in followed.stdout
    assert len(Index.load(out).records) == 12

    slurm.wait(job)
    assert "finished" in submit("status", str(run)).stdout
    wait_for(lambda: slurm.state(job) == "", 60, "SLURM did not forget the job")
    assert "stage finished" in submit("status").stdout
    assert "finished" in submit("logs", str(run)).stderr
    assert run.stat().st_mode & 0o777 == 0o700
    for name in (f"{job}_submission.sh", f"{job}/job.json", f"{job}/code.diff", f"{job}/start-0/preflight.json"):
        assert (run / "jobs" / name).is_file()
    assert (run / "config.yaml").is_file()
    check_cleaned_up(slurm, job, run)


@pytest.mark.slow
def test_a_job_that_slurm_refuses_costs_one_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    stage = ["--stage", "phantom", f"out={tmp_path}/scans"]
    (line,) = submit(*stage, "--partition", "gpu", status=2).stderr.splitlines()
    assert line.startswith("submit.py: sbatch refused the job: ") and "partition" in line
    assert line.endswith("(partitions here: batch, urgent)")
    assert "partition" not in submit("status").stdout  # no job of it is known


@pytest.mark.slow
def test_filters_of_the_users_own_view_hide_no_job(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    monkeypatch.setenv("SQUEUE_PARTITION", "urgent")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert state(job).startswith("pending")


def test_cancel_cleans_up_and_the_lock_of_a_dead_job_is_taken_over(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = tmp_path / "scans.run"
    stage = ["--stage", "phantom", "--time", "10", f"out={tmp_path}/scans", "subjects=9999"]
    job = submit(*stage).stdout.strip()
    wait_for(lambda: read_record(run).get("status") == "running")
    submit("cancel", job)
    check_cleaned_up(slurm, job, run)
    assert "cancelled" in submit("status").stdout

    second = submit(*stage, "shape=[16,16,16]").stdout.strip()
    wait_for(lambda: read_record(run).get("status") == "running" and bool(slurm.job_processes(second)))
    processes = [p for p in slurm.job_processes(second) if "slurmstepd" not in p.name()]
    # As in a power failure, no process sees another one end, and the lock stays behind.
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
    slurm.wait(second)
    third = submit(*stage, "shape=[16,16,16]").stdout.strip()
    assert third != second
    wait_for(lambda: any(Path("/tmp").glob(f"{PREFIX}{third}-*")), 60, "the third job did not start")
    assert not list(Path("/tmp").glob(f"{PREFIX}{second}-*")), "a job first removes the folders of dead ones"
    submit("cancel", str(run))
    check_cleaned_up(slurm, third, run)


@pytest.mark.slow
def test_preflight_reports_every_problem_with_its_node(slurm: SlurmCluster, tmp_path: Path) -> None:
    """With another version of a package on one node and an input that is gone, the job fails before training starts."""
    other = slurm.folder / "other"
    (other / "numpy-0.0.dist-info").mkdir(parents=True)
    (other / "numpy-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0\n")
    slurm.task_environment("n2", PYTHONPATH=str(other))
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: {hold: true}\n")
    keys = [f"latents={tmp_path}/none", f"vae={tmp_path}", f"scalars={tmp_path}", f"out={tmp_path}/joint"]
    (tmp_path / "none").mkdir()
    try:
        options = ["--config", "demo", "--nodes", "2", "--time", "10", "--cluster-config", str(site)]
        job = submit("--stage", "joint", *options, *keys).stdout.strip()
        (tmp_path / "none").rmdir()
        slurm.run("scontrol", "release", job)
        slurm.wait(job)
    finally:
        slurm.task_environment("n2")
    status = submit("status").stdout
    assert "failed" in status
    assert "n2: numpy 0.0 where other nodes have" in status
    for node in ("n1", "n2"):
        assert f"{node}: cannot read latents={tmp_path}/none" in status
    assert "gbit_per_second" in (tmp_path / "joint" / "jobs" / job / "start-0" / "preflight.json").read_text()
    assert not (tmp_path / "joint" / "stage.json").exists()
    check_cleaned_up(slurm, job, tmp_path / "joint")


# --- without SLURM ---


def test_all_descendants_of_a_managed_process_end_with_it_or_with_its_parent(tmp_path: Path) -> None:
    """Daemons that left their parents and ignore SIGTERM end when stopped, and when the parent is killed."""
    script = (
        "import os, signal, sys, time, pathlib\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "time.sleep(600)\n"
    )
    starter = (
        "import sys, time, os\n"
        "from pathlib import Path\n"
        "from launchers.process import ManagedProcess\n"
        "command = [sys.executable, '-c', sys.argv[1], sys.argv[2]]\n"
        "managed = ManagedProcess(command, dict(os.environ), None, Path(sys.argv[3]))\n"
        "if sys.argv[4] == 'end':\n"
        "    while not Path(sys.argv[2]).exists(): time.sleep(0.1)\n"
        "    print(managed.stop())\n"
        "time.sleep(600)\n"
    )
    for way in ("end", "kill"):
        mark, scratch = tmp_path / way, Path(tempfile.mkdtemp(dir=tmp_path))
        command = [sys.executable, "-c", starter, script, str(mark), str(scratch), way]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            wait_for(lambda mark=mark: mark.is_file() and bool(mark.read_text()), 20)
            daemon = psutil.Process(int(mark.read_text()))
            if way == "end":
                assert process.stdout is not None
                assert process.stdout.readline().strip() == str(128 + signal.SIGTERM)
                assert scratch.exists()  # the parent removes it
            process.kill()
            wait_for(lambda daemon=daemon: not daemon.is_running() or daemon.status() == "zombie", 20)
            if way == "kill":
                wait_for(lambda scratch=scratch: not scratch.exists(), 10)


def test_a_managed_process_does_not_receive_the_signals_of_the_job(tmp_path: Path) -> None:
    environment = dict(os.environ)
    managed = ManagedProcess(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(2)"],
        environment,
        tmp_path / "log",
        tmp_path,
    )
    wait_for(lambda: "up" in (tmp_path / "log").read_text())
    for process in [psutil.Process(managed._process.pid), *psutil.Process(managed._process.pid).children()]:
        process.send_signal(signal.SIGUSR2)
    wait_for(lambda: managed.poll() is not None, 20)
    assert managed.stop() == 0


def test_with_fewer_nodes_the_most_workers_that_divide_the_batch_are_used() -> None:
    def workers(nodes: int, gpus: int, batch: int, accumulate: int = 1) -> int:
        values = {"compute": {"workers": 16}, "training": {"batch": batch, "accumulate": accumulate}}
        assignment = Assignment("joint", "/", values, {}, False, True, 4, "/", "/tmp", "", 60)
        return assignment.workers(Allocation("1", 0, 0, nodes, "n", 8, gpus))

    assert workers(4, 4, 48) == 16
    assert workers(3, 4, 48) == 12
    assert workers(3, 4, 32) == 8
    assert workers(2, 4, 32, accumulate=8) == 4
    assert workers(1, 0, 32) == 1
    alone = Assignment("encode", "/", {"compute": {"device": "cpu"}}, {}, True, False, 1, "/", "/tmp", "", 60)
    assert alone.workers(Allocation("1", 0, 0, 1, "n", 8, 0)) == 1


@pytest.mark.parametrize(
    ("text", "limit"), [("90", 90), ("1:30", 2), ("1:30:00", 90), ("2-12", 3600), ("1-0:30", 1470), ("0:0:20", 1)]
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, limit: int) -> None:
    assert minutes(text) == limit


def test_invalid_settings_of_a_site_are_refused(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partitoin: gpu\n")
    with pytest.raises(ConfigError, match="Did you mean 'partition'"):
        load_site(str(site), {})
    with pytest.raises(ConfigError, match="days-hours"):
        load_site("default", {"time": "tomorrow"})
    with pytest.raises(ConfigError, match="no job 4711"):
        jobs.find_job("4711")


@pytest.mark.slow
def test_one_line_trains_the_joint_stage_of_the_project_on_four_nodes(
    slurm: SlurmCluster, first_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``submit.py --stage joint --nodes 4`` after the first stages, typed within another job; it lacks an input."""
    shutil.copytree(first_stages, tmp_path, dirs_exist_ok=True)
    for name in ("latents", "latents.run"):
        shutil.rmtree(tmp_path / "runs" / "demo" / name)
    monkeypatch.chdir(tmp_path)
    for name in ("random", "signal", "numpy", "mvhpc"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a script of the user')")
    for name, value in {"JOB_ID": "4711", "NTASKS": "1", "MEM_PER_CPU": "1", "MEM_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # of the other job
    line = ("--stage", "joint", "--nodes", "4", "--with-inputs")
    assert "#SBATCH --nodes=4" in submit(*line, "--dry-run").stdout
    encode, *_, job = submit(*line).stdout.split()  # encoding is of one process: it has no number of workers
    run = tmp_path / "runs" / "demo" / "joint"
    wait_for(lambda: read_record(run).get("status") == "finished", 300, "the job does not finish")
    slurm.wait(job)
    assert jobs.outcome(jobs.find_job(encode)) == "finished"
    events = {event["event"]: event for event in jobs.find_job(job).events()}
    assert (events["start"]["nodes"], events["start"]["workers"]) == (4, 4)
    assert (run / "model" / "model.json").is_file()
    check_cleaned_up(slurm, job, run)
