"""Faults of MLflow: its server is killed and started again during `mvhpc train joint`, or the stage is killed."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from benchmarks.faults.processes import Victim, killed
from benchmarks.faults.trials import Fault, apply, audit, keys, record_verdict
from mvhpc.runs.journal import read, unseen
from mvhpc.runs.mlflow_names import translate
from mvhpc.runs.mlflow_store import store_client
from mvhpc.runs.mlflow_sync import synced
from tests.test_mlflow import serve

STEPS = 2000  # whole epochs
KINDS = ["server killed", "stage killed", "server killed"]
HOUR_S = 3600
REFERENCE = threading.Lock()


class Server:
    """An MLflow server that is restarted at the same port."""

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

    def leave(self, victim: Victim) -> float:
        """Kill it, and start it again an hour later; training advances a few steps at a time for all of that hour."""
        when, began, first = time.time(), time.monotonic(), victim.step()
        steps = STEPS - 100 - first
        self.kill()
        while (gone := time.monotonic() - began) < HOUR_S:
            victim.process.send_signal(signal.SIGCONT)
            victim.reach(first + int(steps * gone / HOUR_S))
            victim.process.send_signal(signal.SIGSTOP)
            time.sleep(HOUR_S / steps)
        victim.process.send_signal(signal.SIGCONT)
        self.process = serve(self.store, self.port)
        return when


def missing(run: Path, uri: str) -> str:
    """A message on the first metric whose points are not in the store exactly once; empty if all are."""
    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in unseen(translate(read(run))):
        for name, value in event.get("metrics", {}).items() if event["event"] == "metrics" else ():
            expected[re.sub(r"[^\w\-. :/]", "_", name)].append((event["step"], float(value)))
    client = store_client(uri)
    for name, points in expected.items():
        there = [(m.step, m.value) for m in client.get_metric_history(synced(run)["run_id"], name)]
        if sorted(there) != sorted(points):
            return f"MLflow has {len(there)} points of {name}, not the journal's {len(points)}"
    return ""


def tracked(root: Path, name: str, seed: int, kinds: list[str], draw: random.Random, deadline: float) -> list[Fault]:
    """One run of the stage with MLflow under these faults; afterwards the store must hold every point once."""
    faults: list[Fault] = []
    every, whole = "training.checkpoint_every=10", root / "whole" / "tracked"
    with REFERENCE:  # made once
        if not (whole / "checkpoints" / f"step-{STEPS:08d}").is_dir():
            Victim(whole, whole.with_name("notes"), keys(root, whole, STEPS, every), False).finish()
    server = Server(root / name / "store")
    more = (every, f"tracking.uri={server.uri}")
    victim = Victim(root / name / "joint", root / name, keys(root, root / name / "joint", STEPS, *more), True)
    try:
        for kind in kinds:
            target = victim.step() + draw.randrange(3, 200)
            if target > STEPS - 100 or time.monotonic() > deadline:
                break
            victim.reach(max(1, target))
            faults.append(Fault(kind, "tracked", 0, seed, name, victim.step(), 0.0))
            again = kind == "stage killed"
            acts = {
                "server killed": partial(server.bounce, draw),
                "server away": partial(server.leave, victim),
                "stage killed": partial(killed, victim, draw),
            }
            if not apply(faults[-1], victim, acts[kind], again):
                break
            print(f"{name}: {kind} at step {faults[-1].step}: {faults[-1].seconds} s", flush=True)
        victim.finish()
        command = [sys.executable, "-m", "mvhpc", "mlflow-sync", str(victim.run)]
        status = subprocess.run(command, timeout=300, check=False).returncode
        assert status == 0, f"mvhpc mlflow-sync ended with status {status}"
        samples, differs = audit(victim.run, whole)
        record_verdict(faults, samples, " ".join(filter(None, [differs, missing(victim.run, server.uri)])))
    except (AssertionError, subprocess.SubprocessError) as error:
        record_verdict(faults, 0, f"the run did not finish: {error}"[:300])
    finally:
        victim.process.kill()
        server.kill()
    return faults
