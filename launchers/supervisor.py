"""The task of each node of a job: node 0 leads (:mod:`launchers.head`), the others follow; nothing outlives them."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from launchers.allocation import Allocation, Assignment
from launchers.head import Lead
from launchers.node import BOOT_S, TICK_S, Member, Signals
from launchers.process import adopt_orphans, end_descendants
from launchers.rendezvous import connect, own_address
from shards.files import write_text


def supervise(assignment: Assignment) -> None:
    """What the task of each node does, from start to end."""
    signals = Signals()
    adopt_orphans()
    os.chdir(assignment.place)
    allocation = Allocation.here()
    folder = Path(assignment.run) / "jobs" / allocation.job / f"start-{allocation.restart}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        if allocation.node == 0:
            Lead(assignment, allocation, folder, signals).run()
        else:
            follow(assignment, allocation, folder, signals)
    finally:
        end_descendants()


def follow(assignment: Assignment, allocation: Allocation, folder: Path, signals: Signals) -> None:
    """Do what node 0 says until it says to leave, or is gone."""
    token = folder.parent / "token"

    def head() -> tuple[str, str] | None:
        # Written anew each time: a file of one's own makes NFS look at the folder again, and so see the other.
        write_text(folder / f"node-{allocation.node}.json", json.dumps({"name": allocation.name, "pid": os.getpid()}))
        if signals.terminate:
            sys.exit(128 + signal.SIGTERM)
        try:
            return json.loads((folder / "head.json").read_text())["address"], token.read_text()
        except (OSError, ValueError):
            return None

    try:
        link = connect(head, allocation.node, {"name": allocation.name}, BOOT_S)
    except TimeoutError:
        raise RuntimeError(
            f"{allocation.name} found no node 0 through {folder} within {BOOT_S} s; is the run folder on a file "
            f"system that all nodes share, and `interface` in the cluster's YAML that between nodes?"
        ) from None
    with contextlib.closing(link):
        towards = json.loads((folder / "head.json").read_text())["address"].rsplit(":", 1)[0]
        try:
            ip, interface = own_address(assignment.interface, towards)
            member = Member(assignment, allocation, folder, token, ip, interface, link.tell)
        except RuntimeError as error:
            link.tell({"event": "unfit", "why": str(error)})
            time.sleep(TICK_S)
            raise
        with contextlib.closing(member):
            while not signals.terminate:
                member.tick()
                heard = link.next(TICK_S)
                if heard is None:
                    continue
                message = heard[1]
                if message is None or message["do"] == "leave":
                    return
                member.obey(message)
