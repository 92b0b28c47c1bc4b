"""Runs a training function in this process (one worker) or in Ray Train workers (several).

All output of Ray, DeepSpeed and torch goes to ``FOLDER/logs/worker-RANK.log``. An error comes back as one sentence that
names the worker and its log. No process and no temporary folder outlives :func:`launch`.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import pickle
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mvhpc.config import Compute, ConfigError
from mvhpc.runtime.importing import require, resolve
from mvhpc.runtime.process_group import bind, connect
from mvhpc.runtime.scratch import scratch_folder, temporary_folder
from mvhpc.runtime.watchdog import STOP_FILE, Interrupted
from shards.cpus import available_cores
from shards.files import write_once

HOME = Path(__file__).resolve().parent.parent.parent  # of the packages
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
COLLECTIVE_TIMEOUT_S = 1800
# Words in the errors that a worker raises because another one died; such a run is retried.
PEER_FAILURES = ("connection closed", "connection reset", "connection refused", "broken pipe", "nccl", "timed out")


class WorkerError(RuntimeError):
    """A worker failed; the message names it, what happened and its log file."""


def launch(target: str, settings: Any, folder: Path, compute: Compute) -> dict[str, float]:
    """Call ``target(settings, folder, rank, world)`` in each of ``compute.workers`` workers.

    With one worker this is a plain call. With several, Ray Train starts them on the cluster of ``RAY_ADDRESS`` or,
    without one, on this machine. When a worker dies all of them are restarted, at most ``compute.retries`` times; the
    function resumes by itself. An exception that the function raises is not retried.

    Args:
        target: ``module:function``, importable by workers.
        settings: its first argument; pickled.
        folder: the run folder, shared by all workers.
        compute: workers, threads, device, retries.

    Returns:
        the result of rank 0: names -> numbers.

    Raises:
        WorkerError: an error of one of several workers. With one worker the exception itself is raised.
        Interrupted: stopped on request.
        ConfigError: more workers than GPUs, or Ray or DeepSpeed is not installed.
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
    """Let malloc keep freed memory instead of returning it to the kernel, where libc supports it.

    Activations of volumes take megabytes each. Fetched from the kernel at every step, zeroing their pages took a fifth
    of a training step on CPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**27)


# --- the driver ---


def _launch_ray(target: str, settings: Any, folder: Path, compute: Compute) -> dict[str, float]:
    workers = compute.workers
    require("cluster", f"compute.workers={workers}", "ray", "deepspeed")
    folder = folder.absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for leftover in ("error.json", "result.json", "stopped.json"):
        (logs / leftover).unlink(missing_ok=True)
    with ray_session(workers, logs), _ray_folder(folder) as storage:
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
            **{name: os.environ[name] for name in (STOP_FILE,) if name in os.environ},
        }
        trainer = TorchTrainer(
            _worker,
            torch_config=_torch_config(),
            train_loop_config={
                "target": target,
                "settings": pickle.dumps(settings),  # Ray's controller, which needs none of it, imports no model
                "folder": str(folder),
                "working_directory": str(Path.cwd()),  # paths of a configuration may be relative
                "threads": threads,
                "backend": "nccl" if gpus else "gloo",
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
            with ThreadPoolExecutor(1) as thread:  # in the main thread, Ray Train would take SIGINT for itself
                thread.submit(trainer.fit).result()
        except TrainingFailedError as error:
            raise _explain(error, logs) from None
        if (logs / "error.json").is_file():
            raise _explain(None, logs)
        if (logs / "stopped.json").is_file():
            raise Interrupted(_take(logs / "stopped.json"))
        return _take(logs / "result.json")


def _take(path: Path) -> Any:
    """Read a JSON file and remove it."""
    content = json.loads(path.read_text())
    path.unlink()
    return content


@contextlib.contextmanager
def _ray_folder(folder: Path) -> Iterator[Path]:
    """Folder for Ray Train's own state: visible from all nodes, removed afterwards."""
    path = folder / ".ray"
    shutil.rmtree(path, ignore_errors=True)  # left by a driver that was killed
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _explain(error: Any, logs: Path) -> WorkerError:
    """The error that stopped the run: an exception of the function, else the death of a worker that Ray reports."""
    path = logs / "error.json"
    if path.is_file():
        report = json.loads(path.read_text())
        rank, reason = report["rank"], report["error"].strip()
    else:
        failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
        dead = {r: e for r, e in failures.items() if "Died" in type(e).__name__}
        rank, cause = min((dead or failures).items(), default=(0, error))
        reason = (
            "died (killed, out of memory, or ended by the watchdog)" if dead else str(cause).strip().splitlines()[-1]
        )
    log = logs / f"worker-{rank}.log"
    return WorkerError(f"worker {rank}: {reason} (its log: {log})")


@contextlib.contextmanager
def ray_session(workers: int, logs: Path) -> Iterator[None]:
    """A connection to Ray: to the cluster of ``RAY_ADDRESS``, or to a temporary one on this machine.

    The temporary sessions of one process share a token, since Ray keeps the first token of a process for its lifetime.

    Args:
        workers: the least number of CPUs of a temporary cluster.
        logs: folder that gets Ray's own logs after a failure.
    """
    require("cluster", "several workers", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # SLURM signals preemption itself
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # they would have another environment
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 yields to every other process
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # no other machine joins: use loopback
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token())
    import ray
    from ray.job_config import JobConfig

    job = JobConfig()
    if Path.cwd() != HOME:  # Ray would let workers import from there, where a numpy.py would be taken for the package
        job._py_driver_sys_path = _Empty()
    quiet = logging.getLogger("ray")
    level = quiet.level
    with contextlib.ExitStack() as stack:
        local: dict[str, Any] = {}
        if address is None:
            local = {
                "num_cpus": max(workers, available_cores()),
                "object_store_memory": 100 * 2**20,
                "_temp_dir": str(stack.enter_context(temporary_folder())),
            }
        try:
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "job_config": job}
            ray.init(address=address or "local", **options, **local)
            quiet.setLevel(logging.ERROR)
            yield
        except Interrupted:
            raise
        except BaseException:
            if local and not (logs / "error.json").is_file():  # not an error of the function: keep Ray's logs
                for session in Path(local["_temp_dir"]).glob("session_latest/logs"):
                    shutil.copytree(session, logs / "ray", dirs_exist_ok=True)
            raise
        finally:
            ray.shutdown()
            quiet.setLevel(level)


class _Empty(list[str]):
    """A list that stays empty."""

    def extend(self, values: Iterable[str]) -> None:
        """Nothing."""


@functools.cache
def _token() -> Path:
    """A file with the token that this process's Ray sessions require, for the lifetime of this process.

    Without it, any user of the machine could run code through Ray's ports.
    """
    path = scratch_folder() / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


def _torch_config() -> Any:
    """Ray Train's configuration for torch without its process group, whose store listens on every interface."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class NoProcessGroup(Backend):
        share_cuda_visible_devices = True  # as Ray's own backend for torch

    class WorkersConnect(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return NoProcessGroup

    return WorkersConnect()


# --- the workers ---


def _worker(settings: dict[str, Any]) -> None:
    """The main function of each Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(context.get_local_rank())}
    folder = Path(settings["folder"])
    logs = folder / "logs"
    os.chdir(settings["working_directory"])
    if (logs / "error.json").is_file():
        return  # the function itself failed; a restart by Ray would not help
    _redirect(logs / f"worker-{rank}.log")
    torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    try:
        _connect(rank, world, settings["backend"])
        ours = pickle.loads(settings["settings"])  # noqa: S301 of our driver; Ray pickles all else too
        result = resolve(settings["target"])(ours, folder, rank, world)
    except Interrupted as error:  # not a failure, which Ray would retry
        write_once(logs / "stopped.json", json.dumps(str(error)))
        return
    except Exception as error:
        traceback.print_exc()
        if not any(word in str(error).lower() for word in PEER_FAILURES):
            report = {"rank": rank, "error": "".join(traceback.format_exception_only(error))}
            write_once(logs / "error.json", json.dumps(report))
        raise
    if rank == 0:
        write_once(logs / "result.json", json.dumps(result))
    dist.destroy_process_group()


def _connect(rank: int, world: int, backend: str) -> None:
    """Initialise the process group, with its store on the address that Ray uses for rank 0's node."""
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    listener = bind(ray.util.get_node_ip_address()) if rank == 0 else None
    host, port = broadcast_from_rank_zero(listener.getsockname()[:2] if listener is not None else ("", 0))
    connect(backend, host, port, rank, world, COLLECTIVE_TIMEOUT_S, listener)


def _redirect(log: Path) -> None:
    """Send all output of this process, also of its native libraries, to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 for the lifetime of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.WARNING, force=True, stream=sys.stderr)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}", flush=True)
