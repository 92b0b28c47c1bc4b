"""The nodes of a job, as node 0 sees them: registration, preflight, Ray, and the messages that they send."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from launchers.allocation import Allocation, Assignment
from launchers.node import BOOT_TIMEOUT_S, POLL_S, Node, Signals
from launchers.preflight import find_problems
from launchers.rendezvous import Message, RendezvousServer, free_port, own_address
from shards.files import write_text

SHUTDOWN_TIMEOUT_S = 20  # for the nodes to stop what they run


class JobFailed(Exception):
    """The job cannot go on, and a restart would not help."""


class RayFailed(Exception):
    """A Ray process ended; the nodes are still there."""


class Requeue(Exception):
    """The job goes back to the queue: a node is lost, or the job is to make room."""


class Warned(Exception):
    """The signal before preemption or the time limit came before the stage began."""


class Terminated(Exception):
    """SLURM ends the job, or requeues it by itself."""


class NodeGroup:
    """All nodes of a job; this process is node 0.

    Args:
        assignment: what the job is to do.
        allocation: what SLURM allocated.
        folder: of this start of the job, in the run folder.
        token: file with the job's secret.
        signals: that SLURM has sent to this process.
        workers: number of workers; with one node and one worker, Ray is not used.

    Raises:
        JobFailed: this node's interface or scratch folder cannot be used.
    """

    def __init__(
        self,
        assignment: Assignment,
        allocation: Allocation,
        folder: Path,
        token: Path,
        signals: Signals,
        workers: int,
    ) -> None:
        self.assignment, self.allocation, self.folder = assignment, allocation, folder
        self.signals, self.workers = signals, workers
        self.with_ray = allocation.nodes > 1 or workers > 1
        self.names = {0: allocation.name}
        self.registered, self.checked, self.ray_started, self.ray_stopped = {0}, set[int](), set[int](), set[int]()
        self.lost: set[int] = set()
        self.ray_address = ""
        self.attempt = 0
        with contextlib.ExitStack() as stack:
            try:
                alone = allocation.nodes == 1
                self.ip, interface = ("127.0.0.1", "lo") if alone else own_address(assignment.interface, None)
                self.server = RendezvousServer(self.ip, token.read_text())
                stack.callback(self._shut_down)
                self.node = Node(assignment, allocation, folder, token, self.ip, interface, self._deliver)
                stack.callback(self.node.close)
            except (RuntimeError, OSError) as error:
                raise JobFailed(str(error)) from error
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stop everything on all nodes."""
        self._stack.close()

    def _deliver(self, message: Message) -> None:
        self.server.messages.put((0, message))

    def poll(self) -> None:
        """Handle the next message of the nodes, if there is one.

        Raises:
            RayFailed: a Ray process ended.
            Requeue: a node is lost.
            JobFailed: a node cannot be used.
            Terminated: SLURM ends the job.
        """
        self.node.poll()
        if self.signals.terminate:
            raise Terminated
        received = self.server.receive(POLL_S)
        if received is None:
            return
        node, message = received
        name = self.names.get(node, f"node {node}")
        if message is None:
            self.lost.add(node)
            raise Requeue(f"{name} is lost")
        if message.get("attempt", self.attempt) != self.attempt:
            return  # from an earlier start of Ray
        match message["event"]:
            case "registered":
                self.names[node] = message["name"]
                self.registered.add(node)
            case "preflight_done":
                self.checked.add(node)
            case "ray_started":
                self.ray_started.add(node)
                self.ray_address = self.ray_address or message["address"]
            case "ray_stopped":
                self.ray_stopped.add(node)
            case "ray_failed":
                raise RayFailed(f"{name}: {message['reason']}")
            case "node_failed":
                raise JobFailed(f"{name}: {message['reason']}")

    def _wait(self, done: set[int], problem: Callable[[str], str], nodes: int | None = None) -> None:
        """Poll until ``done`` holds the first ``nodes`` nodes (default: all).

        Raises:
            JobFailed: not within the time limit; ``problem`` puts the missing nodes into a sentence.
            Warned: the job is to make room, or ends soon.
        """
        end = time.monotonic() + BOOT_TIMEOUT_S
        while missing := sorted(set(range(nodes or self.allocation.nodes)) - done):
            if time.monotonic() > end:
                job = self.allocation.job
                names = (f"{self.names.get(k, f'node {k}')} (its log: {job}_{k}_log.out)" for k in missing)
                raise JobFailed(problem(", ".join(names)))
            if self.signals.stop:
                raise Warned
            self.poll()

    def gather(self) -> None:
        """Publish the address of node 0 and wait until every node has registered."""
        write_text(self.folder / "head.json", json.dumps({"address": self.server.address}))
        self._wait(
            self.registered,
            lambda nodes: f"{nodes} did not register within {BOOT_TIMEOUT_S} s; can it see the folder {self.folder}?",
        )

    def preflight(self) -> dict[str, float]:
        """Let every node examine itself, with a test all-reduce between them.

        Returns:
            ``seconds`` it took and, with several ranks, ``gbit_per_second`` of the slowest node.

        Raises:
            JobFailed: naming all that is wrong, with its node.
        """
        start = time.monotonic()
        several = self.allocation.nodes > 1 or self.allocation.gpus > 1
        message = {"command": "preflight", "address": f"{self.ip}:{free_port(self.ip)}" if several else ""}
        self.server.send(message)
        self.node.handle(message)
        self._wait(self.checked, lambda nodes: f"{nodes} did not end the preflight within {BOOT_TIMEOUT_S} s")
        reports, missing = {}, []
        for node, name in sorted(self.names.items()):
            try:
                reports[name] = json.loads((self.folder / f"preflight-{node}.json").read_text())
            except OSError:
                missing.append(name)
        problems = find_problems(reports, missing)
        seconds = round(time.monotonic() - start, 1)
        summary = {"nodes": reports, "problems": problems, "seconds": seconds}
        write_text(self.folder / "preflight.json", json.dumps(summary, indent=1))
        if problems:
            raise JobFailed("\n".join(["preflight:", *problems]))
        rates = [report["allreduce"]["gbit_per_second"] for report in reports.values() if "allreduce" in report]
        return {"seconds": seconds, **({"gbit_per_second": min(rates)} if rates else {})}

    def start_ray(self, attempt: int) -> None:
        """Start Ray on node 0, then on the others; each attempt has a number of its own."""
        self.attempt = attempt
        if not self.with_ray:
            return
        self.ray_started.clear()
        self.ray_address = ""
        message: Message = {"command": "start_ray", "head": None, "attempt": attempt, "workers": self.workers}

        def problem(nodes: str) -> str:
            return f"Ray did not start within {BOOT_TIMEOUT_S} s on {nodes}; see {self.folder}"

        self.node.handle(message)
        self._wait(self.ray_started, problem, nodes=1)
        self.server.send({**message, "head": self.ray_address})
        self._wait(self.ray_started, problem)

    def stop_ray(self) -> None:
        """Stop Ray on all nodes, without waiting for one that does not answer."""
        if not self.with_ray:
            return
        self.ray_stopped = {0}
        self.server.send({"command": "stop_ray"})
        self.node.stop_ray()
        self._drain(lambda: self.ray_stopped | self.lost >= set(range(self.allocation.nodes)))

    def _shut_down(self) -> None:
        """Send the other nodes away, and wait until their connections are closed."""
        self.server.send({"command": "shutdown"})
        self._drain(lambda: self.lost >= self.registered - {0})
        self.server.close()

    def _drain(self, done: Callable[[], bool]) -> None:
        """Note which nodes stop and which are lost, until ``done()`` or the time limit; all else is ignored."""
        end = time.monotonic() + SHUTDOWN_TIMEOUT_S
        while not done() and time.monotonic() < end:
            received = self.server.receive(POLL_S)
            if received is not None and received[1] is None:
                self.lost.add(received[0])
            elif received is not None and received[1] is not None and received[1]["event"] == "ray_stopped":
                self.ray_stopped.add(received[0])
