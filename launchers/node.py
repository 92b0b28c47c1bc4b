"""One node of a job: its scratch folder, its preflight checks and its Ray processes, as node 0 commands them.

Each Ray process is a child of this one, under a :class:`~launchers.process.ManagedProcess`. `ray stop` is not used: it
would stop the Ray processes of the user's other jobs on the node too.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launchers.allocation import Allocation, Assignment
from launchers.preflight import examine
from launchers.process import ManagedProcess
from launchers.rendezvous import Message
from mvhpc.config import ConfigError
from mvhpc.runtime.scratch import MAX_PATH, PREFIX, RANDOM, make_scratch, short_parent
from shards.files import write_text

BOOT_TIMEOUT_S = 300  # for the registration of all nodes, the preflight and the start of Ray, each
POLL_S = 0.2
OBJECT_STORE_BYTES = 200 * 2**20  # of Ray, which stores little here
RAY_STARTED = "Ray runtime started"  # printed by `ray start` once the node is part of the cluster


class Signals:
    """Which signals SLURM has sent to this process. Its handlers replace those of submitit."""

    def __init__(self) -> None:
        self.stop = self.terminate = False
        signal.signal(signal.SIGUSR2, self._stop)
        signal.signal(signal.SIGTERM, self._terminate)

    def _stop(self, *_: object) -> None:
        self.stop = True

    def _terminate(self, *_: object) -> None:
        self.terminate = True


class Node:
    """This node.

    Args:
        assignment: what the job is to do.
        allocation: what SLURM allocated.
        folder: of this start of the job, in the run folder.
        token: file with the secret by which Ray's processes authenticate.
        ip: address of this node.
        interface: its network interface.
        send: sends a message to node 0.

    Raises:
        RuntimeError: the scratch folder cannot be used.
    """

    def __init__(
        self,
        assignment: Assignment,
        allocation: Allocation,
        folder: Path,
        token: Path,
        ip: str,
        interface: str,
        send: Callable[[Message], None],
    ) -> None:
        self.assignment, self.allocation, self.ip, self._send = assignment, allocation, ip, send
        self._folder = folder
        self.logs = folder / f"node-{allocation.node}"
        self.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.scratch = _make_scratch(assignment.scratch, allocation)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_worker_niceness": "0",  # default 15; the cores of the job are there for the workers
            # 0, on any system: no other machine joins. Ray then listens on loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(allocation.nodes > 1)),
            # One per job: a compiler that is killed leaves a lock in a shared cache, and all later jobs would hang.
            "TORCH_EXTENSIONS_DIR": str(self.scratch / "extensions"),
            "TMPDIR": str(self.scratch),
        }
        if allocation.nodes > 1:  # without these, both resolve the host name, which may be another interface
            self.environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        self._checks: list[ManagedProcess] = []
        self._report: dict[str, Any] | None = None
        self._ray: ManagedProcess | None = None
        self._ray_log = Path()
        self._ray_started = False
        self._attempt = 0

    def handle(self, message: Message) -> None:
        """Carry out a command of node 0, ``preflight``, ``start_ray`` or ``stop_ray``; :meth:`poll` reports back."""
        if message["command"] == "preflight":
            self._start_preflight(message["address"])
        elif message["command"] == "start_ray":
            self._start_ray(message["head"], message["attempt"], message["workers"])
        elif message["command"] == "stop_ray":
            self.stop_ray()
            self._send({"event": "ray_stopped"})

    def poll(self) -> None:
        """Send node 0 what has changed."""
        if self._report is not None and all(check.poll() is not None for check in self._checks):
            self._finish_preflight()
        if self._ray is None:
            return
        if (status := self._ray.poll()) is not None:
            self.stop_ray()
            reason = f"Ray exited with status {status}; its log is {self._ray_log}"
            self._send({"event": "ray_failed", "attempt": self._attempt, "reason": reason})
        elif not self._ray_started and RAY_STARTED in self._ray_log.read_text(errors="replace"):
            self._ray_started = True
            file = self.scratch / "ray_current_cluster"  # written by Ray on its head node
            address = file.read_text().strip() if file.is_file() else ""
            self._send({"event": "ray_started", "attempt": self._attempt, "address": address})

    def close(self) -> None:
        """Stop every process of this job on this node and remove its scratch folder."""
        for check in self._checks:
            check.stop()
        self.stop_ray()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- preflight ---

    def _start_preflight(self, address: str) -> None:
        """Examine this node and, where ``address`` is not empty, take part in the test all-reduce."""
        allocation = self.allocation
        self._report = examine(Path(self.assignment.run), self.assignment.inputs, self.scratch, allocation.gpus)
        if address:
            here = max(1, allocation.gpus)
            for k in range(here):
                rank, world = allocation.node * here + k, allocation.nodes * here
                out = self.scratch / f"allreduce-{k}.json"
                command = [sys.executable, "-P", "-m", "launchers.allreduce_check"]
                command += [address, str(rank), str(world), str(out)]
                visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
                chosen = {"CUDA_VISIBLE_DEVICES": visible[k]} if k < len(visible) and visible[k] else {}
                log = self.logs / "allreduce.log"
                self._checks.append(ManagedProcess(command, {**self.environment, **chosen}, log, self.scratch))

    def _finish_preflight(self) -> None:
        report = self._report
        assert report is not None
        results: list[dict[str, Any]] = []
        for k, check in enumerate(self._checks):
            out = self.scratch / f"allreduce-{k}.json"
            if check.stop() == 0 and out.is_file():
                results.append(json.loads(out.read_text()))
            else:
                lines = (self.logs / "allreduce.log").read_text(errors="replace").strip().splitlines()
                results.append({"error": lines[-1] if lines else "no error message"})
        if results:
            wrong = [r for r in results if not r.get("correct")]
            report["allreduce"] = wrong[0] if wrong else results[0]
        write_text(self._folder / f"preflight-{self.allocation.node}.json", json.dumps(report, indent=1))
        self._report, self._checks = None, []
        self._send({"event": "preflight_done"})

    # --- Ray ---

    def _start_ray(self, head: str | None, attempt: int, workers: int) -> None:
        """Start Ray's head process, or join the one at address ``head``."""
        allocation = self.allocation
        # Without GPUs, the number of CPUs alone spreads the workers over the nodes: one CPU per worker.
        cpus = -(-workers // allocation.nodes) if self.assignment.trains else allocation.cpus
        if allocation.gpus:
            cpus = max(allocation.cpus, allocation.gpus)
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        head_only = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]  # no autoscaler
        command += head_only if head is None else [f"--address={head}"]
        if head is None and importlib.util.find_spec("grpc"):
            command.append("--ray-client-server-port=0")  # no client server, which would listen at a fixed port
        command += [
            "--include-log-monitor=false",  # it would send every line to the driver; workers have their own log files
            "--min-worker-port=0",  # any free ports; Ray's default range is the same for all jobs on a host
            "--max-worker-port=0",
            f"--node-ip-address={self.ip}",
            f"--node-name={allocation.name}",
            f"--temp-dir={self.scratch}",
            f"--num-cpus={cpus}",
            f"--num-gpus={allocation.gpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]
        self._attempt = attempt
        self._ray_log = self.logs / f"ray-{attempt}.log"
        self._ray_started = False
        self._ray_log.touch()
        self._ray = ManagedProcess(command, self.environment, self._ray_log, self.scratch)

    def stop_ray(self) -> None:
        """Stop Ray's processes on this node and copy its logs to the run folder."""
        if self._ray is None:
            return
        self._ray.stop()
        self._ray = None
        for session in self.scratch.glob("session_2*"):
            with contextlib.suppress(OSError):
                shutil.copytree(session / "logs", self._ray_log.with_suffix(""), dirs_exist_ok=True)
            shutil.rmtree(session, ignore_errors=True)
        (self.scratch / "ray_current_cluster").unlink(missing_ok=True)


def _make_scratch(scratch: str, allocation: Allocation) -> Path:
    """The scratch folder of this job and node; those of killed processes are removed first."""
    name = f"{allocation.job}-{allocation.node}-"
    below = len(f"/{PREFIX}{name}") + RANDOM
    try:
        parent = Path(scratch) if scratch else short_parent(below)
        folder = make_scratch(parent, name)
    except ConfigError as error:
        raise RuntimeError(f"{allocation.name}: {error}") from error
    except OSError as error:
        raise RuntimeError(f"{allocation.name}: cannot make a folder in scratch={parent}: {error.strerror}") from error
    if len(os.fsencode(folder)) > MAX_PATH:
        shutil.rmtree(folder)
        raise RuntimeError(
            f"scratch={parent}: too long for the paths of Ray's sockets; name a folder of at most "
            f"{MAX_PATH - below} bytes"
        )
    return folder
