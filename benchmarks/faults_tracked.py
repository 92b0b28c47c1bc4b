"""Faults of MLflow: its server dies and comes back while `mvhpc train joint` goes on, or dies itself."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults import Victim, killed
from trials import Fault, audit, keys, settle, suffer

from mvhpc.journal import read, unseen
from mvhpc.store import as_metrics, store_client
from mvhpc.tracking import _state
from tests.test_tracking import serve

STEPS = 2000
KINDS = ["server killed", "stage killed", "server killed"]


class Server:
    """An MLflow server that always comes back at the same port."""

    def __init__(self, store: Path) -> None:
        store.mkdir(parents=True)
        self.store = store
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = serve(store, self.port)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def bounce(self, draw: random.Random) -> float:
        """Kill it, and start it again some seconds later."""
        when = time.time()
        self.kill()
        time.sleep(draw.uniform(1, 10))
        self.process = serve(self.store, self.port)
        return when


def missing(run: Path, uri: str) -> str:
    """What the store does not have exactly once of the journal's points; empty where nothing."""
    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in unseen(map(as_metrics, read(run))):
        for name, value in event.get("metrics", {}).items() if event["event"] == "metrics" else ():
            expected[re.sub(r"[^\w\-. :/]", "_", name)].append((event["step"], float(value)))
    client = store_client(uri)
    for name, points in expected.items():
        there = [(m.step, m.value) for m in client.get_metric_history(_state(run)["run"], name)]
        if sorted(there) != sorted(points):
            return f"MLflow has {len(there)} points of {name}, not the journal's {len(points)}"
    return ""


def tracked(root: Path, name: str, seed: int, plan: Iterator[str], draw: random.Random, deadline: float) -> list[Fault]:
    """One run of the whole stage with MLflow under faults; afterwards the store has every point once."""
    faults: list[Fault] = []
    server = Server(root / name / "store")
    more = ("training.checkpoint_every=10", f"tracking.uri={server.uri}")
    victim = Victim(root / name / "joint", root / name, keys(root, root / name / "joint", STEPS, *more), True)
    try:
        whole = root / "whole" / "tracked"
        if not (whole / "checkpoints" / f"step-{STEPS:08d}").is_dir():
            Victim(whole, whole.with_name("notes"), keys(root, whole, STEPS, more[0]), False).finish()
        for kind in draw.sample(KINDS, len(KINDS)):
            target = victim.step() + draw.randrange(3, 200)
            if target > STEPS - 100 or time.monotonic() > deadline:
                break
            victim.reach(max(1, target))
            faults.append(Fault(kind, "tracked", 0, seed, name, victim.step(), 0.0))
            again = kind == "stage killed"
            act = partial(killed, victim, draw) if again else partial(server.bounce, draw)
            if not suffer(faults[-1], victim, act, again):
                break
            print(f"{name}: {kind} at step {faults[-1].step}: {faults[-1].seconds} s", flush=True)
        victim.finish()
        subprocess.run([sys.executable, "-m", "mvhpc", "mlflow-sync", str(victim.run)], check=True, timeout=300)
        samples, differs = audit(victim.run, whole)
        settle(faults, samples, " ".join(filter(None, [differs, missing(victim.run, server.uri)])))
    except (AssertionError, subprocess.SubprocessError) as error:
        settle(faults, 0, f"the run did not finish: {error}"[:300])
    finally:
        victim.process.kill()
        server.kill()
    return faults
