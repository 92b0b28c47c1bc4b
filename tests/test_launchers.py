"""Laws of submission: a dry run shows the job and starts nothing; a job's result is the result of the command."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from launchers import jobs
from launchers.allocation import Allocation
from launchers.driver import FAILED, RETRY, exit_status, run_stage
from launchers.plan import Step, chain, single
from launchers.preflight import examine
from launchers.rendezvous import RendezvousClient, RendezvousServer
from launchers.site import load_site
from launchers.submit import main
from mvhpc.config import ConfigError, load_config, to_dict
from mvhpc.data_stages import PackConfig
from mvhpc.pipeline.project import Request
from mvhpc.runs.folder import read_record
from mvhpc.stages import STAGES
from shards.errors import TooManyRejects
from shards.index import Index
from shards.phantom.make import make_phantoms
from tests.conftest import SMALL_JOINT


@pytest.fixture(autouse=True)
def separate_registry(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep these runs out of the user's list of runs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


pytest_plugins = ["tests.first_stages"]
SUBMIT = Path(__file__).resolve().parent.parent / "launchers" / "submit.py"


def test_dry_run_prints_the_resolved_configuration_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"source={tmp_path}/scans", f"out={tmp_path}/packed", "spacing=3.5"]
    assert main(["--stage", "pack", "--cluster", "local", "--config", "demo", "--dry-run", *keys]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == to_dict(load_config(PackConfig, "pack", "demo", keys))
    assert f"submitit.core._submit {tmp_path}/packed.run/jobs" in shown
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--stage jiont", "Did you mean 'joint'?"),
        (
            "--stage baseline --cluster local data=d want=age given=[i] out=o compute.workers=3",
            "training.batch=16",
        ),
        ("--stage pack sorce=a out=b", "Did you mean 'source'?"),
        ("--stage pack --config dmo source=a out=b", "Did you mean 'demo'?"),
        ("--stage pack --cluster locl source=a out=b", "Did you mean 'local'?"),
        ("--stage phantom --nodes 2 --cluster local out=b", "take --nodes 1"),
        ("--stage pack --root nowhere out=b", "source=nowhere/source: no such file or folder"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert hint in capsys.readouterr().err


def test_submit_does_not_wait_for_torch_to_be_imported() -> None:
    code = "import sys, launchers.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_python_without_the_packages_is_named_in_one_line() -> None:
    command = [sys.executable, "-S", "-E", str(SUBMIT), "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "activate the environment" in line and sys.executable in line


@pytest.mark.parametrize(
    ("error", "status", "traces"),
    [
        (ConfigError("a"), FAILED, False),
        (TooManyRejects("a"), FAILED, False),
        (FileNotFoundError(2, "No such file", "a"), FAILED, False),
        (ConnectionError("a"), RETRY, True),
        (KeyError("a"), FAILED, True),
    ],
)
def test_a_job_prints_the_traceback_of_an_unexpected_error_alone(
    error: Exception, status: int, traces: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(error) == status
    assert bool(capsys.readouterr().err) == traces


@pytest.mark.slow
def test_jobs_end_as_the_command_does(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "scans", 6, (32, 32, 32), 0)

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SUBMIT), "--stage", "pack", "--cluster", "local", "--config", "demo", *arguments],
            cwd=tmp_path,  # relative paths start from the caller's folder
            capture_output=True,
            text=True,
            check=False,
        )

    good = submit("source=scans", "out=packed")
    assert good.returncode == 0, good.stderr
    assert len(Index.load(tmp_path / "packed").records) == 6
    assert ["packed", "6"] in [line.split() for line in good.stdout.splitlines()]
    assert len(list((tmp_path / "packed.run" / "jobs").glob("*.out"))) == 1

    bad = submit("source=nowhere", "out=other")
    assert bad.returncode == 2  # before anything is submitted
    assert "source=nowhere: no such file or folder" in bad.stderr
    assert not list(tmp_path.glob("other*"))


@pytest.mark.slow
def test_interrupt_ends_the_job_and_leaves_no_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SUBMIT),
        "--stage",
        "phantom",
        "--cluster",
        "local",
        f"out={tmp_path}/scans",
        "subjects=9999",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as submit:
        assert submit.stderr is not None
        assert "phantom" in submit.stderr.readline()
        wait_for(lambda: (tmp_path / "scans.run" / "tracking.json").exists())
        submit.send_signal(
            signal.SIGINT
        )  # to submit.py alone, as from a scheduler; a terminal signals the whole process group
        assert submit.wait(120) == 130
    wait_for(lambda: not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(words(p))])
    assert not (tmp_path / "scans").exists()


# --- the number of workers ---


def joint(preset: str = "demo", *overrides: str, nodes: int = 4, gpus: int = 0, slurm: bool = True) -> Step:
    """A step of the joint stage; its shipped preset ``demo`` has two workers."""
    places = [f"{key}=here" for key in ("latents", "vae", "scalars", "out")]
    request = Request(STAGES["joint"], preset, [*places, "training.batch=16", *overrides], {})
    (step,) = single(request.configure(), False, nodes, gpus, slurm)
    return step


def test_a_presets_workers_are_replaced_by_one_per_gpu_or_node_and_the_step_says_so() -> None:
    step = joint()
    assert (step.config.compute.workers, step.nodes) == (4, 4)
    assert step.note == "compute.workers=4 (4 nodes x 1), in place of the preset's 2"
    step = joint("demo", gpus=2, nodes=2)
    assert step.note == "compute.workers=4 (2 nodes x 2), in place of the preset's 2"
    assert joint(nodes=2).note == ""
    assert joint(nodes=1).note == "compute.workers=1 (1 node x 1), in place of the preset's 2"


@pytest.mark.parametrize("text", ["compute: {workers: 2}\n", "compute:\n  workers: 2\n  threads: 1\n"])
def test_workers_of_a_users_file_are_kept(tmp_path: Path, text: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    step = joint(str(own))
    assert (step.config.compute.workers, step.nodes) == (2, 2)
    assert step.note == "compute.workers=2, as configured: runs on 2 of 4 nodes"
    step = joint(str(own), nodes=2)
    assert (step.config.compute.workers, step.nodes, step.note) == (2, 2, "")
    own.write_text("training: {epochs: 3}\n")
    assert joint(str(own)).config.compute.workers == 4  # the file does not set them


@pytest.mark.parametrize("override", ["compute.workers=8", "compute={workers: 8}"])
def test_workers_of_the_command_line_are_kept(override: str) -> None:
    step = joint("demo", override, gpus=4, nodes=4)
    assert (step.config.compute.workers, step.nodes) == (8, 2)


def test_workers_of_a_users_pipeline_file_are_kept(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"preset: demo\nroot: {tmp_path}/root\njoint: {{compute: {{workers: 2}}}}\n")
    steps = {step.stage: step for step in chain(str(own), [], 4, 0, True)[1]}
    assert (steps["joint"].config.compute.workers, steps["joint"].nodes) == (2, 2)
    assert (steps["vae"].config.compute.workers, steps["vae"].nodes) == (2, 2)  # the most that divide its batch of 2
    assert (steps["predict"].config.compute.workers, steps["predict"].nodes) == (4, 4)
    assert (steps["encode"].nodes, steps["encode"].note) == (1, "")
    assert not any(step.finished for step in steps.values())


def test_every_stage_of_a_pipeline_knows_its_workers(tmp_path: Path) -> None:
    """On the nodes of its job: those of its configuration; a stage of one process has one, and no key for them."""
    for step in chain("demo", [f"root={tmp_path}/root"], 4, 0, True)[1]:
        assignment = step.assignment(load_site("default", {}))
        found = assignment.workers(Allocation("1", 0, 0, step.nodes, "n", 8, 0))
        assert found == getattr(getattr(step.config, "compute", None), "workers", 1), step.stage


def test_the_preflight_reads_every_path_of_an_input(tmp_path: Path) -> None:
    """Also of a stage that compares several runs."""
    (tmp_path / "jobs").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    keys = [f"runs=[{tmp_path}/a,{tmp_path}/b]", f"data={tmp_path}/a", f"out={tmp_path}/tables"]
    (step,) = single(Request(STAGES["evaluate"], None, keys, {}).configure(), False, 1, 0, True)
    inputs = step.assignment(load_site("default", {})).inputs
    assert inputs == {"runs": [f"{tmp_path}/a", f"{tmp_path}/b"], "data": [f"{tmp_path}/a"]}
    assert examine(tmp_path, inputs, tmp_path, 0)["problems"] == []
    (tmp_path / "b").rmdir()
    (problem,) = examine(tmp_path, inputs, tmp_path, 0)["problems"]
    assert problem.startswith(f"cannot read runs={tmp_path}/b (No such file or directory)")


def test_without_slurm_nodes_are_workers_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    step = joint(slurm=False)
    assert (step.config.compute.workers, step.nodes) == (4, 1)
    assert step.note == "compute.workers=4 (on this machine), in place of the preset's 2"
    assert joint(slurm=False, nodes=1).config.compute.workers == 2  # the preset's
    step = joint("demo", "compute.workers=2", slurm=False)
    assert (step.config.compute.workers, step.nodes) == (2, 1)
    assert "this machine, not 4 nodes" in step.note

    arguments = "--stage joint --nodes 4 --cluster local --config demo --dry-run latents=a vae=b scalars=s out=c"
    assert main([*arguments.split(), "training.batch=16"]) == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["compute"]["workers"] == 4
    assert "joint: compute.workers=4 (on this machine), in place of the preset's 2\n" in shown.err


# --- the lock of a run ---


HOLD_ON_AFTER_RELEASE = """
import sys, time
from pathlib import Path
from launchers import head, jobs
from launchers.allocation import Allocation
from launchers.driver import run_stage
run = Path(sys.argv[1])
with jobs.locked(run) as lock:
    lock.set_holder(jobs.new_job(run, "1", "local", "pack", 1))
with jobs.locked(run) as lock:
    lock.set_holder(None)
    print("released", flush=True)
    time.sleep(1)  # the other process is waiting, or has taken the lock
"""
TAKE = """
import sys
from pathlib import Path
from launchers import head, jobs
from launchers.allocation import Allocation
from launchers.driver import run_stage
run = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
with jobs.locked(run) as lock:
    assert lock.holder is None, lock.holder
    lock.set_holder(jobs.new_job(run, "2", "local", "pack", 1))
"""


def test_a_released_lock_does_not_take_that_of_the_next_holder_with_it(tmp_path: Path) -> None:
    """The second process takes the lock while the first one, which has just released it, is still at it."""

    def start(script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start(TAKE) as second, start(HOLD_ON_AFTER_RELEASE) as first:
        assert first.stdout and second.stdin and second.stdout
        assert second.stdout.readline() == "ready\n"
        assert first.stdout.readline() == "released\n"
        second.stdin.write("go\n")
        second.stdin.close()
        assert [first.wait(30), second.wait(30)] == [0, 0]
    with jobs.locked(tmp_path) as lock:
        assert lock.holder is not None and lock.holder.id == "2"


def test_of_concurrent_processes_one_holds_the_lock(tmp_path: Path) -> None:
    """Many processes take the lock where it is free, and release it: never two at a time, and none in the end."""
    script = (
        "import sys, time, os\n"
        "from pathlib import Path\n"
        "from launchers import jobs\n"
        "run, mark = Path(sys.argv[1]), Path(sys.argv[1]) / 'holding'\n"
        "done = 0\n"
        "while done < 20:\n"
        "    job = jobs.new_job(run, str(os.getpid()), 'local', 'pack', 1)\n"
        "    with jobs.locked(run) as lock:\n"
        "        if lock.holder is not None: continue\n"
        "        lock.set_holder(job)\n"
        "    mark.touch(exist_ok=False); time.sleep(0.001); mark.unlink()\n"
        "    jobs.release(run, job.id)\n"
        "    done += 1\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    with jobs.locked(tmp_path) as lock:
        assert lock.holder is None


def words(process: psutil.Process) -> list[str]:
    """The command line of a process; empty where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.2)


# --- the files of a job in a run folder ---


def run_chained(stage: str, run: Path, overrides: list[str]) -> None:
    """Run a stage of a chain as its job does; a job has a log and a lock in the run folder."""
    (run / "jobs").mkdir(parents=True, exist_ok=True)
    (run / "jobs" / "7_0_log.out").touch()
    with jobs.locked(run) as lock:
        lock.set_holder(jobs.new_job(run, "7", "slurm", stage, 1))
    run_stage(stage, to_dict(load_config(STAGES[stage].config_class(), stage, "default", overrides)), chained=True)


def files_of_the_job(run: Path) -> set[str]:
    with jobs.locked(run) as lock:
        assert lock.holder is not None and lock.holder.id == "7"
    return {path.name for path in (run / "jobs").iterdir()}


def test_a_changed_stage_of_a_chain_is_set_aside_without_the_files_of_its_job(tmp_path: Path) -> None:
    run = tmp_path / "scans.run"
    keys = [f"out={tmp_path}/scans", "shape=[16,16,16]"]
    for subjects in (2, 3):
        run_chained("phantom", run, [*keys, f"subjects={subjects}"])
        assert files_of_the_job(run) == {"7_0_log.out", "lock"}
        assert len(list((tmp_path / "scans").glob("sub-*"))) == subjects
    assert len(list((tmp_path / "scans.old-1").glob("sub-*"))) == 2
    assert read_record(tmp_path / "scans.run.old-1")["status"] == "finished"
    assert not (tmp_path / "scans.run.old-1" / "jobs").exists()


@pytest.mark.slow
def test_a_changed_training_of_a_chain_is_set_aside_without_the_files_of_its_job(
    tiny_inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder is the output folder here: the job's files alone are no earlier result."""
    run = tmp_path / "joint"
    keys = [*(f"{key}={path}" for key, path in tiny_inputs.items()), f"out={run}", "training.epochs=1"]
    keys += ["training.batch=2", "compute.threads=1", *(f"{key}={value}" for key, value in SMALL_JOINT.items())]
    run_chained("joint", run, keys)
    assert "set aside" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("joint*")] == ["joint"]
    run_chained("joint", run, keys)
    assert "complete and unchanged" in capsys.readouterr().err
    run_chained("joint", run, [*keys, "training.seed=1"])
    assert "set aside" in capsys.readouterr().err
    assert files_of_the_job(run) == {"7_0_log.out", "lock"}
    for folder in (run, tmp_path / "joint.old-1"):
        assert read_record(folder)["status"] == "finished" and (folder / "model" / "model.json").is_file()
    assert not (tmp_path / "joint.old-1" / "jobs").exists()


# --- the line a user types ---


def without_slurm(folder: Path) -> str:
    """A search path with all programs of this machine except SLURM's."""
    folder.mkdir()
    slurm = {"sbatch", "srun", "sinfo", "scontrol", "squeue", "scancel"}
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            if program.name not in slurm and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@pytest.mark.slow
def test_one_line_trains_the_joint_stage_of_the_project(
    first_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``submit.py --stage joint --nodes 4`` after the first four stages, where no SLURM is installed."""
    shutil.copytree(first_stages, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PATH": without_slurm(tmp_path / "bin")}
    command = [sys.executable, str(SUBMIT), "--stage", "joint", "--nodes", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "joint: project runs/demo (preset demo)" in done.stderr
    assert "compute.workers=4 (on this machine), in place of the preset's 2" in done.stderr
    folder = tmp_path / "runs" / "demo" / "joint"
    assert read_record(folder)["status"] == "finished" and (folder / "model" / "model.json").is_file()
    assert len(list((folder / "logs").glob("worker-*.log"))) == 4
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "complete and unchanged: reused runs/demo/joint" in again.stderr


# --- connections between nodes ---


def test_a_node_does_not_take_a_connection_to_itself_for_node_0() -> None:
    """A connection to a free port of the ephemeral range can get that very port as its own, and so reach itself."""
    with socket.socket() as probe:  # connect() draws from the ports of the parity of the range's first
        first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        port = next(p for p in range(first + 4000, first + 8000, 2) if probe.connect_ex(("127.0.0.1", p)))
    for _ in range(30_000):
        with pytest.raises(OSError) as refusal:
            RendezvousClient(f"127.0.0.1:{port}", "token", 1, "n1").close()
        if "nothing listens" in str(refusal.value):
            return
    pytest.skip("no connection reached itself")


def test_a_client_without_the_token_is_not_a_node() -> None:
    """Neither is one that speaks another protocol; the node that comes after them is."""
    server = RendezvousServer("127.0.0.1", "token")
    ip, port = server.address.rsplit(":", 1)
    for line in (b"GET /health HTTP/1.1\r\n\r\n", b'{"node": 1, "token": "other", "name": "n1"}\n', b"[]\n", b"\n"):
        with socket.create_connection((ip, int(port)), timeout=30) as stranger:
            stranger.sendall(line)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    client = RendezvousClient(server.address, "token", 2, "n2")
    assert server.receive(30) == (2, {"event": "registered", "name": "n2"})
    client.send({"event": "ray_stopped"})
    assert server.receive(30) == (2, {"event": "ray_stopped"})
    server.send({"command": "shutdown"})
    assert client.receive(30) == (0, {"command": "shutdown"})
    client.close()
    assert server.receive(30) == (2, None)
    server.close()
