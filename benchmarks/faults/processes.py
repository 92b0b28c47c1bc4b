"""Faults of training in a single process.

The process trains the joint stage on tiny latents. At each step it also looks for a file that requests a fault which
must come from inside the process (NaN in a micro-batch, a hang).
"""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.trials import RECOVERY_S, Fault, apply, audit, keys, record_verdict
from mvhpc.config import load_config
from mvhpc.runs.journal import read
from mvhpc.runtime.ray_cluster import launch
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.loop import train
from mvhpc.training.metrics import MAX_SKIPPED
from shards.files import write_text
from tests.slurm_cluster import wait_for

DISK_MIB = 64
HANG_S = 24  # well above the longest step on a busy machine
PACE_S = 0.04  # added to each step, so that a run outlasts faults of several seconds


# --- the process that trains ----------------------------------------------------------------------------------------


class FaultyTask(JointTask):
    """The joint task with the faults requested by the file ``order`` in the folder of notes."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.notes = Path(os.environ["CHAOS_NOTES"])
        self.poisoned = {order["step"] for order in carried_out(self.notes) if order["kind"] == "poisoned"}
        self.burst: set[int] = set()
        self.last = -1

    def step(self, batch: dict[str, Any], engines: Any, step: int, indices: list[int]) -> dict[str, Tensor]:
        time.sleep(PACE_S)
        if step <= self.last:
            self.burst.clear()  # after the rollback training gets good samples
        self.last = step
        order = self.notes / "order"
        if order.exists():
            kind = order.read_text()
            with (self.notes / "carried_out.jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, "time": time.time()}) + "\n")
            order.unlink()
            if kind == "poisoned":
                self.poisoned.add(step)
            elif kind == "five poisoned":
                self.burst.update(range(step, step + MAX_SKIPPED))
            else:
                time.sleep(600)
        if step in self.poisoned or step in self.burst:
            bad = {n: x.fill_(torch.nan) if x.dtype == torch.float16 else x for n, x in batch["values"].items()}
            batch = {**batch, "values": bad}
        return super().step(batch, engines, step, indices)


def carried_out(notes: Path) -> list[dict[str, Any]]:
    """The requests that were carried out."""
    path = notes / "carried_out.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def worker(config: JointConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as a worker of the joint stage does."""
    return train(FaultyTask(config), config, folder, rank, world)


# --- the bench ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A small file system of its own, which can be filled and made read-only."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Forked:
    """A forked process with everything imported; the interface is that of subprocess.Popen."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.faults.processes", "torch._dynamo"])

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process = self.context.Process(target=target, args=arguments)
        self._process.start()
        self.kill, self.terminate = self._process.kill, self._process.terminate
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the run", seconds or 0.0)
        return self._process.exitcode


class Victim:
    """A run in a single process that is started again whenever it ends too soon.

    Args:
        run: its folder.
        notes: folder of requests and the log, on another file system than the run.
        overrides: of its configuration.
        whole_command: run `mvhpc train joint`, MLflow included; otherwise training alone, which takes requests.
    """

    def __init__(self, run: Path, notes: Path, overrides: list[str], whole_command: bool) -> None:
        self.run, self.notes, self.stop_file = run, notes, notes / "stop"
        notes.mkdir(parents=True, exist_ok=True)
        self.overrides, self.whole_command = overrides, whole_command
        self.start()

    def start(self) -> None:
        """Start or resume."""
        variables = {"CHAOS_NOTES": str(self.notes), "MVHPC_STOP_FILE": str(self.stop_file), "OMP_NUM_THREADS": "1"}
        self.process: Any
        if not self.whole_command:
            self.process = Forked(main, self.overrides, variables)
            return
        command = [sys.executable, "-m", "mvhpc", "train", "joint", *self.overrides]
        environment = os.environ | variables
        with (self.notes / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def step(self) -> int:
        """The last finished step."""
        return max((e["step"] for e in read(self.run) if e["event"] == "metrics"), default=0)

    def reach(self, step: int) -> None:
        """Wait for a step."""

        def there() -> bool:
            assert self.process.poll() is None or self.step() >= step, f"ended by itself, status {self.process.poll()}"
            return self.step() >= step

        wait_for(there, RECOVERY_S, f"step {step} does not come")

    def end(self) -> None:
        """Wait until it has ended, and start it again."""
        self.process.wait(RECOVERY_S)
        self.stop_file.unlink(missing_ok=True)
        self.start()

    def finish(self) -> None:
        """Wait until the run is complete."""
        status = self.process.wait(RECOVERY_S)
        assert status == 0, f"ended with status {status}"


class Missed(Exception):
    """The run was over before the fault could come."""


def killed(victim: Victim, draw: random.Random) -> float:
    time.sleep(0.3 * draw.random())
    when = time.time()
    victim.process.kill()
    victim.end()
    return when


def killed_writing(victim: Victim, draw: random.Random) -> float:
    """While a checkpoint is being written."""
    parts = victim.run / "checkpoints"
    while True:
        while not list(parts.glob(".step-*.part/*/*")):
            assert victim.process.poll() is None, "ended by itself"
        when = time.time()
        victim.process.kill()
        caught = list(parts.glob(".step-*.part"))
        victim.process.wait()
        if list(parts.glob(".step-*.part")) and caught:
            break
        victim.start()  # the checkpoint was complete already: try again
        victim.reach(victim.step() + 1)
    victim.end()
    return when


def terminated(victim: Victim, draw: random.Random) -> float:
    when = time.time()
    victim.process.terminate()
    victim.end()
    return when


def stopped(victim: Victim, draw: random.Random) -> float:
    when = time.time()
    victim.stop_file.touch()
    victim.end()
    return when


def disk_full(victim: Victim, draw: random.Random) -> float:
    filler, before = victim.run.parent / "filler", _newest(victim)
    when = time.time()
    end = time.monotonic() + draw.uniform(1, 3)
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < end:  # space freed meanwhile is filled too
            with contextlib.suppress(OSError):
                file.write(bytes(4096))
    filler.unlink()
    wait_for(lambda: _newest(victim) > before, 60, "no further checkpoint is written")
    return when


def read_only(victim: Victim, draw: random.Random) -> float:
    def remount(how: str) -> bool:
        """Remount the bind mount: the file system itself refuses while a removed file is still mapped."""
        command = ["mount", "-o", f"remount,bind,{how}", str(victim.run.parent)]
        return subprocess.run(command, capture_output=True).returncode == 0

    while not remount("ro"):  # refused while a file is being written
        if victim.process.poll() is not None:
            raise Missed
    when, before = time.time(), _newest(victim)
    time.sleep(draw.uniform(1, 3))
    assert remount("rw")
    wait_for(lambda: _newest(victim) > before, 60, "no further checkpoint is written")
    return when


def _newest(victim: Victim) -> str:
    return max((p.name for p in (victim.run / "checkpoints").glob("step-*")), default="")


def _ordered(kind: str) -> Callable[[Victim, random.Random], float]:
    def fault(victim: Victim, draw: random.Random) -> float:
        if kind == "five poisoned":  # training rolls back to a checkpoint, so there must be one
            wait_for(lambda: bool(_newest(victim)), 60, "no checkpoint is written")
        count = len(carried_out(victim.notes))
        write_text(victim.notes / "order", kind)
        wait_for(lambda: len(carried_out(victim.notes)) > count, 60, "the request was not carried out")
        if kind == "hang":
            victim.end()
        return float(carried_out(victim.notes)[-1]["time"])

    return fault


RESTARTING = {"killed", "killed writing", "terminated", "stopped", "five poisoned", "hang"}
PLAIN: dict[str, Callable[[Victim, random.Random], float]] = {
    "killed": killed,
    "killed writing": killed_writing,
    "terminated": terminated,
    "stopped": stopped,
    "disk full": disk_full,
    "read-only": read_only,
    "poisoned": _ordered("poisoned"),
    "five poisoned": _ordered("five poisoned"),
    "hang": _ordered("hang"),
}


def rollbacks(notes: Path, run: Path) -> list[tuple[float, float]]:
    """Intervals from five consecutive NaN batches to the rollback."""
    back = [e["time"] for e in read(run) if e["event"] == "warning" and "goes back" in e["text"]]
    bursts = [order["time"] for order in carried_out(notes) if order["kind"] == "five poisoned"]
    return [(burst, min((t for t in back if t >= burst), default=burst)) for burst in bursts]


def plain(root: Path, name: str, seed: int, plan: Iterator[str], draw: random.Random, deadline: float) -> list[Fault]:
    """One run under faults until its steps or the time end, compared with a reference run with the same NaN batches."""
    steps, faults, notes = 395, list[Fault](), root / name
    more = ("training.checkpoint_every=10", f"compute.hang_minutes={HANG_S / 60}")
    with disk(root / name / "disk") as mounted:
        victim = Victim(mounted / "joint", notes, keys(root, mounted / "joint", steps, *more), False)
        try:
            victim.reach(1)
            while time.monotonic() < deadline:
                target = victim.step() + draw.randrange(2, 15)
                if target > steps - 100:
                    break
                victim.reach(target)
                kind = next(plan)
                faults.append(Fault(kind, "plain", 0, seed, name, victim.step(), 0.0))
                act = PLAIN[kind]
                try:
                    if not apply(faults[-1], victim, partial(act, victim, draw), kind in RESTARTING):
                        break
                except Missed:
                    faults.pop()
                    break
                print(f"{name}: {kind} at step {faults[-1].step}: {faults[-1].seconds} s", flush=True)
            victim.finish()
            whole = Victim(notes / "whole", notes, keys(root, notes / "whole", steps, *more), False)
            whole.finish()
            record_verdict(faults, *audit(victim.run, whole.run, rollbacks(notes, victim.run)))
        except (AssertionError, subprocess.SubprocessError) as error:
            record_verdict(faults, 0, f"the run did not finish: {error}"[:300])
        finally:
            victim.process.kill()
    return faults


def main(overrides: list[str], environment: dict[str, str]) -> None:
    """Run the training process."""
    os.environ.update(environment)
    log = os.open(Path(environment["CHAOS_NOTES"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    config = load_config(JointConfig, "joint", "default", overrides)
    launch("benchmarks.faults.processes:worker", config, Path(config.out), config.compute)
