"""One node of a job: its temporary folder, its part of the preflight, its Ray. It does what node 0 says.

Ray's processes are children of this one, each under a :class:`~launchers.process.Ward`; what Ray itself offers to stop
them would stop those of the user's other jobs too.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from launchers.allocation import Allocation, Assignment
from launchers.preflight import examine
from launchers.process import Ward
from launchers.rendezvous import Message
from mvhpc.runtime.bind_address import only_at
from shards.files import write_text

BOOT_S = 300  # how long nodes, Ray and the preflight may take each
TICK_S = 0.2
LONGEST_SCRATCH = 40  # characters, for 107 bytes of a socket's path
OBJECTS = 200 * 2**20  # bytes of Ray's object store, which holds little here
READY = "Ray runtime started"  # what `ray start` prints once the node belongs to its cluster


class Signals:
    """What SLURM has signalled to this process: its own handlers, in place of submitit's."""

    def __init__(self) -> None:
        self.stop = self.terminate = False
        signal.signal(signal.SIGUSR2, self._stop)
        signal.signal(signal.SIGTERM, self._terminate)

    def _stop(self, *_: object) -> None:
        self.stop = True

    def _terminate(self, *_: object) -> None:
        self.terminate = True


class Member:
    """This node.

    Args:
        assignment: what the job does.
        allocation: what SLURM gave it.
        folder: of this start of the job, in the run folder.
        token: file with the secret that Ray's processes ask of one another.
        ip: this node's address.
        interface: its network interface.
        tell: sends a message to node 0.

    Raises:
        RuntimeError: a scratch folder that cannot be used.
    """

    def __init__(
        self,
        assignment: Assignment,
        allocation: Allocation,
        folder: Path,
        token: Path,
        ip: str,
        interface: str,
        tell: Callable[[Message], None],
    ) -> None:
        self.assignment, self.allocation, self.ip, self._tell = assignment, allocation, ip, tell
        self._folder = folder
        self.logs = folder / f"node-{allocation.node}"
        self.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.scratch = _scratch(Path(assignment.scratch), allocation)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **only_at(ip),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_prestart_worker_first_driver": "0",
            # Ray's default is 15, behind all else on the node; what trains is what the job was given its cores for.
            "RAY_worker_niceness": "0",
            # 0, on any system: no other machine joins. Ray then listens on loopback, even where only_at cannot help.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(allocation.nodes > 1)),
            # Compiled anew for every job: a compiler killed in a shared cache leaves a lock that hangs all later ones.
            "TORCH_EXTENSIONS_DIR": str(self.scratch / "extensions"),
            "TMPDIR": str(self.scratch),
        }
        if allocation.nodes > 1:  # else they resolve the host's name, which may lead elsewhere
            self.environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        self._checks: list[Ward] = []
        self._report: dict[str, Any] | None = None
        self._ray: Ward | None = None
        self._ray_log = Path()
        self._joined = False
        self._attempt = 0

    def obey(self, message: Message) -> None:
        """Do what node 0 says: ``check``, ``ray`` or ``end``; :meth:`tick` tells it how that went."""
        if message["do"] == "check":
            self._check(message["address"])
        elif message["do"] == "ray":
            self._start_ray(message["head"], message["attempt"], message["workers"])
        elif message["do"] == "end":
            self.end_ray()
            self._tell({"event": "ended"})

    def tick(self) -> None:
        """Tell node 0 what has changed."""
        if self._report is not None and all(check.poll() is not None for check in self._checks):
            self._finish_check()
        if self._ray is None:
            return
        if (status := self._ray.poll()) is not None:
            self.end_ray()
            self._tell(
                {
                    "event": "broken",
                    "attempt": self._attempt,
                    "why": f"Ray ended with status {status}; its log is {self._ray_log}",
                }
            )
        elif not self._joined and READY in self._ray_log.read_text(errors="replace"):
            self._joined = True
            # (a file that Ray writes in its head node's folder)
            address = self.scratch / "ray_current_cluster"
            known = address.read_text().strip() if address.is_file() else ""
            self._tell({"event": "joined", "attempt": self._attempt, "address": known})

    def close(self) -> None:
        """End everything of this job on this node."""
        for check in self._checks:
            check.end()
        self.end_ray()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- preflight ---

    def _check(self, address: str) -> None:
        """Examine this node and, where ``address`` is not empty, add up a number with the others."""
        allocation = self.allocation
        self._report = examine(Path(self.assignment.run), self.assignment.inputs, self.scratch, allocation.gpus)
        if address:
            here = max(1, allocation.gpus)
            for k in range(here):
                rank, world = allocation.node * here + k, allocation.nodes * here
                out = self.scratch / f"reduce-{k}.json"
                command = [sys.executable, "-m", "launchers.allreduce_check", address, str(rank), str(world), str(out)]
                visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
                chosen = {"CUDA_VISIBLE_DEVICES": visible[k]} if k < len(visible) and visible[k] else {}
                log = self.logs / "reduce.log"
                self._checks.append(Ward(command, {**self.environment, **chosen}, log, self.scratch))

    def _finish_check(self) -> None:
        report = self._report
        assert report is not None
        results: list[dict[str, Any]] = []
        for k, check in enumerate(self._checks):
            out = self.scratch / f"reduce-{k}.json"
            if check.end() == 0 and out.is_file():
                results.append(json.loads(out.read_text()))
            else:
                lines = (self.logs / "reduce.log").read_text(errors="replace").strip().splitlines()
                results.append({"error": lines[-1] if lines else "without a word"})
        if results:
            bad = [r for r in results if not r.get("right")]
            report["reduce"] = bad[0] if bad else results[0]
        write_text(self._folder / f"preflight-{self.allocation.node}.json", json.dumps(report, indent=1))
        self._report, self._checks = None, []
        self._tell({"event": "checked"})

    # --- Ray ---

    def _start_ray(self, head: str | None, attempt: int, workers: int) -> None:
        """Start the head, or join the one at address ``head``."""
        allocation = self.allocation
        # Without GPUs a worker is told from another node's by the CPUs alone: no more of them than workers to come.
        cpus = -(-workers // allocation.nodes) if self.assignment.trains else allocation.cpus
        if allocation.gpus:
            cpus = max(allocation.cpus, allocation.gpus)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        head_only = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]  # which asks for more nodes
        command += head_only if head is None else [f"--address={head}"]
        if head is None and importlib.util.find_spec("grpc"):
            command.append("--ray-client-server-port=0")  # none: it is one more door, always at one port
        command += [
            "--include-log-monitor=false",  # which sends every line to the driver; workers write files of their own
            "--min-worker-port=0",  # any free ones; Ray's range is the same for all of a host
            "--max-worker-port=0",
            f"--node-ip-address={self.ip}",
            f"--node-name={allocation.name}",
            f"--temp-dir={self.scratch}",
            f"--num-cpus={cpus}",
            f"--num-gpus={allocation.gpus}",
            f"--object-store-memory={OBJECTS}",
        ]
        self._attempt = attempt
        self._ray_log = self.logs / f"ray-{attempt}.log"
        self._joined = False
        self._ray_log.touch()
        self._ray = Ward(command, self.environment, self._ray_log, self.scratch)

    def end_ray(self) -> None:
        """End Ray's processes here, and keep its logs where they may say something."""
        if self._ray is None:
            return
        self._ray.end()
        self._ray = None
        for session in self.scratch.glob("session_2*"):
            with contextlib.suppress(OSError):
                shutil.copytree(session / "logs", self._ray_log.with_suffix(""), dirs_exist_ok=True)
            shutil.rmtree(session, ignore_errors=True)
        (self.scratch / "ray_current_cluster").unlink(missing_ok=True)


def _scratch(parent: Path, allocation: Allocation) -> Path:
    """A new temporary folder of this job and node; those of jobs that were killed are removed on the way."""
    for old in parent.glob("mv-*"):
        with contextlib.suppress(OSError, ValueError):
            if old.stat().st_uid == os.getuid():
                pid, born = (old / "owner").read_text().split()
                if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).create_time() != float(born):
                    shutil.rmtree(old, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"mv-{allocation.job}-{allocation.node}-", dir=parent))  # 0700
    except OSError as error:
        raise RuntimeError(f"{allocation.name}: no folder can be made in scratch={parent}: {error.strerror}") from error
    if len(str(folder)) > LONGEST_SCRATCH:
        folder.rmdir()
        raise RuntimeError(
            f"scratch={parent}: Ray's socket paths would be too long; name a folder of at most "
            f"{LONGEST_SCRATCH - len(folder.name) - 1} characters"
        )
    (folder / "owner").write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    return folder
