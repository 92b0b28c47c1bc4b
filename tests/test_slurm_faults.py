"""Training on two nodes of a real SLURM, through faults of every kind: the model is bit-equal to an undisturbed run."""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from launchers import jobs
from launchers.rendezvous import own_address
from mvhpc.config import load_config
from mvhpc.models.bundle import load
from mvhpc.runs.journal import read
from mvhpc.stages import STAGES
from mvhpc.training.joint import JointConfig
from mvhpc.training.run import train_worker
from tests.conftest import SMALL_JOINT, listening
from tests.slurm_cluster import NODES, SlurmCluster, wait_for
from tests.test_slurm import check_cleaned_up, separate_state, submit  # noqa: F401 (a fixture)
from tests.toy_task import curves, digest, join
from tests.workers import start_workers

pytest_plugins = ["tests.slurm_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = {
    1: 81,
    2: 81,
    3: 27,
}  # ZeRO stage -> steps; enough for all faults to occur before the end, fewer where a step is slow
KEYS = [
    *(f"{key}={value}" for key, value in SMALL_JOINT.items()),
    "optimizer.warmup=4",
    "optimizer.lr=1.0e-5",  # twelve people are overfitted, and rounding errors would then grow from step to step
    "training.batch=2",
    "training.validate_every=20",
    "training.checkpoint_every=10",
    "training.log_every=1",
    "compute.threads=1",
    "compute.retries=3",
]


@dataclass
class Training:
    """One run of the joint stage on the cluster."""

    slurm: SlurmCluster
    run: Path
    job: str

    def step(self) -> int:
        """The last step that is recorded."""
        return max((e["step"] for e in read(self.run) if e["event"] == "metrics"), default=0)

    def reach(self, step: int, seconds: float = 300) -> None:
        """Wait until that step is recorded and the job is running."""

        def reached() -> bool:
            state = self.slurm.state(self.job)
            assert state in {"RUNNING", "PENDING"}, f"the job is {state or 'forgotten'}"
            return state == "RUNNING" and self.step() >= step

        wait_for(reached, seconds, f"step {step} was not reached")

    def finish(self, seconds: float = 300) -> None:
        """Wait until the job is over, and check by its own journal that it finished; SLURM soon forgets it."""
        self.slurm.wait(self.job, seconds=seconds)
        job = next(job for job in jobs.jobs_of(self.run) if job.id == self.job)
        assert jobs.outcome(job) == "finished", job.log.read_text()

    def process(self, title: str) -> psutil.Process:
        """One of the job's processes, by a part of its command line."""
        found = [p for p in self.slurm.job_processes(self.job) if title in _words(p)]
        assert found, f"no {title}"
        return min(found, key=lambda p: p.pid)

    def listening(self, ours: bool = False) -> set[str]:
        """The addresses on which the job's processes listen, except SLURM's own.

        Args:
            ours: without the port for Ray's messages, on all interfaces, of each process that Ray knows.
        """
        addresses: set[str] = set()
        for process in self.slurm.job_processes(self.job):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() not in {"srun", "slurmstepd"}:
                    found = listening(process)
                    addresses |= found - {"::"} if ours and _is_ray(process) else found
        return addresses

    def driver(self) -> psutil.Process:
        """The driver; with one worker, training runs in it."""
        manager = self.process("launchers.driver")  # the process with the smallest number manages it
        return manager.children()[0]


def starts(run: Path) -> int:
    """How often training was started or resumed."""
    return sum(e["event"] == "start" for e in read(run))


def model(run: Path) -> str:
    """A hash of all weights of the model."""
    return digest(dict(load(run / "model").denoiser.state_dict()))


def _is_ray(process: psutil.Process) -> bool:
    """Whether the process is one of Ray's or the driver, which Ray's server is in too."""
    return any(word in _words(process) for word in ("ray::", "gcs_server", "raylet", "launchers.driver"))


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def keys(inputs: dict[str, str], run: Path, zero: int) -> list[str]:
    """Overrides of the joint stage, for one ZeRO stage."""
    epochs = STEPS[zero] // 3  # of three steps each
    places = [f"{key}={path}" for key, path in inputs.items()] + [f"out={run}"]
    return [*places, f"compute.zero_stage={zero}", f"training.epochs={epochs}", *KEYS]


def start(slurm: SlurmCluster, inputs: dict[str, str], run: Path, zero: int, *more: str) -> Training:
    """Submit the joint stage to two nodes."""
    arguments = keys(inputs, run, zero)
    job = submit("--stage", "joint", "--nodes", "2", "--time", "30", *more, *arguments).stdout.strip()
    return Training(slurm, run, job)


def _train_undisturbed(rank: int, inputs: dict[str, str], folder: Path) -> None:
    join(rank, 2, folder / "rendezvous")
    for zero in STEPS:
        run = folder / f"zero{zero}"
        config = load_config(JointConfig, "joint", "default", keys(inputs, run, zero))
        train_worker((STAGES["joint"].task, config), run, rank, 2)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(tiny_inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one undisturbed run of two workers per ZeRO stage, without SLURM and Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start_workers(_train_undisturbed, (tiny_inputs, folder), 2)
    for zero in STEPS:
        assert starts(folder / f"zero{zero}") == 1
    return folder


# --- faults ---


def worker_killed(training: Training) -> None:
    """A worker is killed, as when memory runs out: Ray restarts all workers."""
    training.process("RayTrainWorker").send_signal(signal.SIGKILL)


def head_killed(training: Training) -> None:
    """Ray's control process is killed: the supervisors restart Ray."""
    training.process("gcs_server").send_signal(signal.SIGKILL)


def driver_killed(training: Training) -> None:
    """The driver, which started Ray's workers, is killed."""
    training.driver().send_signal(signal.SIGKILL)


def supervisor_killed(training: Training) -> None:
    """The supervisor of node 0 is killed: the job's script requeues it."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    supervisors = [p for p in slurm.job_processes(training.job) if "submitit.core._submit" in _words(p)]
    first = [p for p in supervisors if p.name() != "srun" and p.environ().get("SLURM_NODEID") == "0"]
    min(first, key=lambda p: p.create_time()).send_signal(signal.SIGKILL)
    slurm.start_again(training.job, restarts + 1)


@contextlib.contextmanager
def suspended(training: Training, worker: psutil.Process) -> Iterator[None]:
    """Suspend a worker until the job receives its signal, so that training does not finish before."""
    worker.suspend()
    yield
    wait_for(
        lambda: read(training.run / "jobs" / training.job)[-1]["event"] == "stop", 120, "the job received no signal"
    )
    worker.resume()


def urgent_job(slurm: SlurmCluster) -> str:
    """Submit a job over all nodes to the partition that preempts the other."""
    return slurm.run("sbatch", "--parsable", "--partition=urgent", f"--nodes={len(NODES)}", "--exclusive",
                     "--output=/dev/null", "--wrap=sleep 1")  # fmt: skip


def preempted(training: Training) -> None:
    """A job of a higher partition preempts this one."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    with suspended(training, training.process("RayTrainWorker")):
        other = urgent_job(slurm)
    slurm.wait(other)
    slurm.start_again(training.job, restarts + 1)


def out_of_time(training: Training) -> None:
    """The time limit is close."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    with suspended(training, training.process("RayTrainWorker")):  # SLURM checks time limits twice a minute
        minutes = int(slurm.run("squeue", "--noheader", "--jobs", training.job, "--format=%M").split(":")[-2])
        slurm.run("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes + 2}")
    wait_for(lambda: slurm.restarts(training.job) > restarts, 120, "the job was not requeued")
    slurm.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=30")
    slurm.start_again(training.job, restarts + 1)


def node_down(training: Training) -> None:
    """A node is set down: SLURM requeues the job and chooses other nodes."""
    slurm = training.slurm
    restarts = slurm.restarts(training.job)
    slurm.down("n2")
    slurm.start_again(training.job, restarts + 1)
    slurm.up("n2")


Fault = Callable[[Training], None]
FAULTS: list[Fault] = [
    worker_killed, head_killed, driver_killed, supervisor_killed, preempted, out_of_time, node_down
]  # fmt: skip


def test_the_model_equals_that_of_an_undisturbed_run(
    slurm: SlurmCluster,
    undisturbed: Path,
    tiny_inputs: dict[str, str],
    tmp_path: Path,
    testrun_uid: str,
) -> None:
    """Four faults of different kinds, in each run of the suite others; `benchmarks.faults.chaos` injects all."""
    seed = testrun_uid  # set by --testrunuid
    draw = random.Random(seed)
    zero, faults = draw.choice([*STEPS]), draw.sample(FAULTS, 4)
    training = start(slurm, tiny_inputs, tmp_path / "joint", zero)
    training.reach(1)
    assert training.listening(ours=True) == {own_address("", None)[0]}, "all but Ray listens on the interface alone"
    for number, fault in enumerate(faults):
        part = STEPS[zero] // (len(faults) + 1)
        step = draw.randrange(number * part + part // 2, (number + 1) * part)
        print(f"seed {seed}, ZeRO-{zero}: {fault.__name__} at step {step}")
        training.reach(step)
        started, when = starts(training.run), time.monotonic()
        fault(training)
        wait_for(
            lambda started=started: starts(training.run) > started,
            300,
            f"training did not resume after {fault.__name__}",
        )
        print(f"  resumed after {time.monotonic() - when:.1f} s")
    training.finish()
    assert model(training.run) == model(undisturbed / f"zero{zero}")
    assert curves(training.run) == curves(undisturbed / f"zero{zero}")
    check_cleaned_up(slurm, training.job, training.run)


def test_two_jobs_on_one_node_do_not_interfere(
    slurm: SlurmCluster, undisturbed: Path, tiny_inputs: dict[str, str], tmp_path: Path
) -> None:
    """Each has a Ray of two workers that listens on loopback alone. One is cancelled and cleans up; the other ends as
    it does alone."""
    site = tmp_path / "site.yaml"
    site.write_text("cpus_per_task: 2\nsbatch: {nodelist: n1}\n")
    alone = ("--nodes", "1", "--cluster-config", str(site), "compute.workers=2")
    first, second = (start(slurm, tiny_inputs, tmp_path / name, 1, *alone) for name in ("first", "second"))
    first.reach(1)
    first.process("RayTrainWorker").suspend()  # so that it is still running
    second.reach(1)
    assert slurm.state(first.job) == slurm.state(second.job) == "RUNNING"
    assert second.listening() == {"127.0.0.1"}, "a job of one node listens on loopback alone"
    submit("cancel", first.job)
    check_cleaned_up(slurm, first.job, first.run)
    second.finish()
    assert starts(second.run) == 1 and model(second.run) == model(undisturbed / "zero1")
    check_cleaned_up(slurm, second.job, second.run)


def test_fewer_nodes_and_more_again_give_the_same_losses(
    slurm: SlurmCluster, undisturbed: Path, tiny_inputs: dict[str, str], tmp_path: Path
) -> None:
    """Two workers, one, two again: the batch stays the same, and only the order of sums differs."""
    training = start(slurm, tiny_inputs, tmp_path / "joint", 2, "--min-nodes", "1")
    training.reach(STEPS[2] // 4)
    restarts = slurm.restarts(training.job)
    for node in NODES[1:]:
        slurm.down(node)
    slurm.start_again(training.job, restarts + 1)
    wait_for(lambda: starts(training.run) > 1, 300, "training did not resume on one node")
    with suspended(training, training.driver()):
        for node in NODES[1:]:
            slurm.up(node)
        other = urgent_job(slurm)
    slurm.wait(other)
    slurm.start_again(training.job, restarts + 2)
    training.finish()
    journal = read(training.run / "jobs" / training.job)
    assert [event["workers"] for event in journal if event["event"] == "start"] == [2, 1, 2]
    ours, undisturbed_curves = curves(training.run), curves(undisturbed / "zero2")
    assert ours.keys() == undisturbed_curves.keys()
    losses = [key for key in undisturbed_curves if "loss" in key[1]]
    assert len(losses) > STEPS[2]
    for key in losses:
        # the loss of a density, in nats, may be near zero: there the tolerance is absolute
        assert ours[key] == pytest.approx(undisturbed_curves[key], rel=1e-5, abs=1e-5), key
    check_cleaned_up(slurm, training.job, training.run)
