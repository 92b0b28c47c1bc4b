"""A training function run in this process (one worker) or by Ray Train workers (more). Nothing else imports Ray here.

Everything Ray, DeepSpeed and torch print goes to ``FOLDER/logs/worker-RANK.log``; what stops a run comes back as one
sentence that names the worker and its log. Nothing outlives :func:`launch`: no process, no temporary folder.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import Compute, ConfigError
from mvhpc.runtime.bind_address import only_at
from mvhpc.runtime.importing import resolve
from mvhpc.runtime.scratch import scratch_folder
from mvhpc.runtime.watchdog import STOP_FILE, Interrupted
from shards.cpus import available_cores

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
# What a worker sees when another one is gone; such a run is worth trying again.
CONSEQUENCES = ("connection closed", "connection reset", "connection refused", "broken pipe", "nccl", "timed out")


class WorkerError(RuntimeError):
    """A worker failed; the message names it, what happened and its log file."""


def launch(target: str, settings: Any, folder: Path, compute: Compute) -> dict[str, float]:
    """Call ``target(settings, folder, rank, world)`` at each of ``compute.workers`` workers.

    With one worker that is a plain call. With more, Ray Train starts them (on the cluster of ``RAY_ADDRESS`` where that
    is set, else on this machine), sets up their process group, and after a worker was killed starts all of them again,
    ``compute.retries`` times at most; the function is expected to resume by itself. An exception that the
    function raises is not tried again.

    Args:
        target: ``module:function``, importable by workers.
        settings: what it is given; pickled.
        folder: the run folder, shared by all workers.
        compute: workers, threads, device, retries.

    Returns:
        what rank 0 returned: names -> numbers.

    Raises:
        WorkerError: with several workers. With one, whatever the function raises.
        Interrupted: stopped on request.
        ConfigError: more workers than GPUs.
    """
    if compute.workers == 1:
        keep_freed_memory()
        before = torch.get_num_threads()
        torch.set_num_threads(compute.threads or min(before, available_cores()))
        try:
            return resolve(target)(settings, folder, 0, 1)
        finally:
            torch.set_num_threads(before)
    return _launch_ray(target, settings, folder, compute)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed instead of returning it to the kernel, where libc can.

    Activations of volumes are megabytes each; fetched anew from the kernel at every step, zeroing their pages took a
    fifth of the time of a training step on CPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**27)


# --- the driver ---


def _launch_ray(target: str, settings: Any, folder: Path, compute: Compute) -> dict[str, float]:
    workers = compute.workers
    folder = folder.absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for leftover in ("error.json", "result.json", "stopped.json"):
        (logs / leftover).unlink(missing_ok=True)
    with ray_session(workers, logs), _scratch(folder) as storage:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        gpus = int(ray.cluster_resources().get("GPU", 0)) if compute.device != "cpu" else 0
        if 0 < gpus < workers:
            raise ConfigError(f"compute.workers={workers}, but Ray sees {gpus} GPUs; one worker takes one GPU")
        nodes = sum(node["Alive"] for node in ray.nodes())
        threads = compute.threads or max(1, available_cores() * nodes // workers)
        environment = {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": str(threads),
            **({} if gpus else {"DS_ACCELERATOR": "cpu"}),
            **({} if "RAY_ADDRESS" in os.environ else only_at("127.0.0.1")),  # a cluster's nodes see to it themselves
            **{name: os.environ[name] for name in (STOP_FILE,) if name in os.environ},
        }
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "target": target,
                "settings": settings,
                "folder": str(folder),
                "place": str(Path.cwd()),  # the paths of a configuration may be relative to it
                "threads": threads,
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1, "GPU": 1} if gpus else {"CPU": 1},
            ),
            run_config=RunConfig(
                name=folder.name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=compute.retries),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _explain(error, logs) from None
        if (logs / "error.json").is_file():
            raise _explain(None, logs)
        if (logs / "stopped.json").is_file():
            raise Interrupted(_take(logs / "stopped.json"))
        return _take(logs / "result.json")


def _take(path: Path) -> Any:
    """The content of a JSON file, which is gone afterwards."""
    content = json.loads(path.read_text())
    path.unlink()
    return content


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Where Ray Train keeps its own notes: seen from all nodes, and gone afterwards."""
    path = folder / ".ray"
    shutil.rmtree(path, ignore_errors=True)  # of a driver that was killed
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _explain(error: Any, logs: Path) -> WorkerError:
    """The sentence that says what stopped the run: an exception of the function, else a death that Ray saw."""
    path = logs / "error.json"
    if path.is_file():
        told = json.loads(path.read_text())
        rank, what = told["rank"], told["error"].strip()
    else:
        failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
        dead = {r: e for r, e in failures.items() if "Died" in type(e).__name__}
        rank, cause = min((dead or failures).items(), default=(0, error))
        what = "died (killed, out of memory, or ended after a hang)" if dead else str(cause).strip().splitlines()[-1]
    log = logs / f"worker-{rank}.log"
    return WorkerError(f"worker {rank}: {what} (its log: {log})")


@contextlib.contextmanager
def ray_session(workers: int, logs: Path) -> Iterator[None]:
    """A connection to Ray: the cluster of ``RAY_ADDRESS``, or one of this machine for the time being.

    All of this program's own sessions ask for one token: Ray keeps the first way of a process for its whole life.

    Args:
        workers: CPUs it has at least.
        logs: folder that takes Ray's own logs where it fails.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # of Ray's own clusters; SLURM has its signals
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle ones, in another environment than is wanted
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default is 15: behind all else on the machine
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # "no other machine joins": it listens on loopback alone
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token())
    import ray

    quiet = logging.getLogger("ray")
    level = quiet.level
    with contextlib.ExitStack() as stack:
        local: dict[str, Any] = {}
        if address is None:
            temporary = tempfile.TemporaryDirectory(prefix="", dir=scratch_folder(), ignore_cleanup_errors=True)
            local = {
                "num_cpus": max(workers, available_cores()),
                "object_store_memory": 100 * 2**20,
                "_temp_dir": stack.enter_context(temporary),
            }
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
            quiet.setLevel(logging.ERROR)
            yield
        except Interrupted:
            raise
        except BaseException:
            if local and not (logs / "error.json").is_file():  # no fault of the function's: Ray's logs may say more
                for session in Path(local["_temp_dir"]).glob("session_latest/logs"):
                    shutil.copytree(session, logs / "ray", dirs_exist_ok=True)
            raise
        finally:
            ray.shutdown()
            quiet.setLevel(level)


@functools.cache
def _token() -> Path:
    """A file with the secret that Ray's processes of this one ask of one another, for the life of this process.

    Without it any user of the machine could run code through Ray's ports.
    """
    path = scratch_folder() / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


# --- the workers ---


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    folder = Path(settings["folder"])
    logs = folder / "logs"
    os.chdir(settings["place"])
    if (logs / "error.json").is_file():
        return  # the function itself failed; Ray starting everybody again would not help
    _redirect(logs / f"worker-{rank}.log")
    torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    try:
        result = resolve(settings["target"])(settings["settings"], folder, rank, world)
    except Interrupted as error:  # no failure, which Ray would try again
        _write_once(logs / "stopped.json", str(error))
        return
    except Exception as error:
        traceback.print_exc()
        if not any(word in str(error).lower() for word in CONSEQUENCES):
            _write_once(logs / "error.json", {"rank": rank, "error": "".join(traceback.format_exception_only(error))})
        raise
    if rank == 0:
        _write_once(logs / "result.json", result)


def _redirect(log: Path) -> None:
    """Send all this process prints, from Python or below it, to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 for the life of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.WARNING, force=True, stream=sys.stderr)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}", flush=True)


def _write_once(path: Path, content: Any) -> None:
    """Write JSON whole, unless another worker was first."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content))
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    part.unlink()
