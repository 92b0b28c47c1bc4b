"""The task of each node of a job: node 0 is the head (:mod:`launchers.head`), the others carry out its commands.

No process of a job outlives the supervisor of its node.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from launchers.allocation import Allocation, Assignment
from launchers.head import Head
from launchers.node import BOOT_TIMEOUT_S, POLL_S, Node, Signals
from launchers.process import become_subreaper, stop_descendants
from launchers.rendezvous import connect, own_address
from shards.files import write_text


def supervise(assignment: Assignment) -> None:
    """The task of one node, from start to end."""
    signals = Signals()
    become_subreaper()
    os.chdir(assignment.cwd)
    allocation = Allocation.from_environment()
    folder = Path(assignment.run) / "jobs" / allocation.job / f"start-{allocation.restart}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        if allocation.node == 0:
            Head(assignment, allocation, folder, signals).run()
        else:
            serve(assignment, allocation, folder, signals)
    finally:
        stop_descendants()


def serve(assignment: Assignment, allocation: Allocation, folder: Path, signals: Signals) -> None:
    """Carry out the commands of node 0 until it sends ``shutdown`` or is lost."""
    token = folder.parent / "token"

    def lookup() -> tuple[str, str] | None:
        # Written every time: writing a file makes an NFS client read the folder again, and so see the head's file.
        write_text(folder / f"node-{allocation.node}.json", json.dumps({"name": allocation.name, "pid": os.getpid()}))
        if signals.terminate:
            sys.exit(128 + signal.SIGTERM)
        try:
            return json.loads((folder / "head.json").read_text())["address"], token.read_text()
        except (OSError, ValueError):
            return None

    try:
        client = connect(lookup, allocation.node, allocation.name, BOOT_TIMEOUT_S)
    except TimeoutError:
        raise RuntimeError(
            f"{allocation.name} did not reach node 0 through {folder} within {BOOT_TIMEOUT_S} s; is the run folder on "
            f"a file system that all nodes share, and `interface` in the cluster's YAML the one between nodes?"
        ) from None
    with contextlib.closing(client):
        towards = json.loads((folder / "head.json").read_text())["address"].rsplit(":", 1)[0]
        try:
            ip, interface = own_address(assignment.interface, towards)
            node = Node(assignment, allocation, folder, token, ip, interface, client.send)
        except RuntimeError as error:
            client.send({"event": "node_failed", "reason": str(error)})
            time.sleep(POLL_S)
            raise
        with contextlib.closing(node):
            while not signals.terminate:
                node.poll()
                received = client.receive(POLL_S)
                if received is None:
                    continue
                message = received[1]
                if message is None or message["command"] == "shutdown":
                    return
                node.handle(message)
