"""The time of a start and of a resumption, by phase."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.speed.ways import settings
from mvhpc.runtime.ray_cluster import launch
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.loop import train

KILLED = 14  # the step (from 0) in which a worker is killed; a checkpoint every 4


def mark(folder: Path, what: str) -> None:
    """Record the time of an event."""
    with (folder / "marks.jsonl").open("a") as file:
        file.write(json.dumps([what, time.time()]) + "\n")


class Killed(JointTask):
    """Records its first steps; in step :data:`KILLED` worker 1 is killed, once."""

    def __init__(self, config: JointConfig, folder: Path, rank: int) -> None:
        super().__init__(config)
        self.folder, self.rank, self.begun = folder, rank, False

    def step(self, batch: dict[str, Any], engines: Any, step: int, indices: list[int]) -> dict[str, Tensor]:
        first, self.begun = not self.begun, True
        if first and self.rank == 0:
            mark(self.folder, "engines")
        if step == KILLED and self.rank == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            mark(self.folder, "killed")
            os.kill(os.getpid(), signal.SIGKILL)
        scalars = super().step(batch, engines, step, indices)
        if self.rank == 0 and (first or step == KILLED):
            mark(self.folder, "first step" if first else "new step")
        return scalars


def started(config: JointConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank``, and record each phase."""

    def reached(what: str) -> None:
        if rank == 0:
            mark(folder, what)

    reached("worker")
    import deepspeed  # noqa: F401

    reached("DeepSpeed")
    task = Killed(config, folder, rank)
    reached("data")
    return train(task, config, folder, rank, world)


def child(root: Path) -> None:
    """The command that is measured."""
    folder = root / "started"
    mark(folder, "imports")
    config = settings(root, 2, KILLED + 4)
    config.training.checkpoint_every = 4
    config.compute.retries = 2
    config.out = str(folder)
    launch("benchmarks.speed.starts:started", config, folder, replace(config.compute, workers=2))


def start(root: Path) -> str:
    """A table of the phases up to the first step, and from a kill to the first new step."""
    folder = root / "started"
    folder.mkdir()
    mark(folder, "command")
    subprocess.run([sys.executable, "-m", "benchmarks.speed.starts", str(root)], check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (folder / "marks.jsonl").read_text().splitlines()]
    names = [name for name, _ in events]
    cut = names.index("killed")
    phases = {
        "imports": "Python and imports of the command",
        "worker": "Ray, its workers, their imports and process group",
        "DeepSpeed": "import of DeepSpeed",
        "data": "data and network",
        "engines": "engines; checkpoint read",
        "first step": "first step",
        "new step": "repeated steps and the first new one",
    }
    lines = ["| s | start | after the kill of a worker |", "|---|---:|---:|"]
    both = [dict(zip(names[:cut], _laps(events[:cut]))), dict(zip(names[cut:], _laps(events[cut:])))]
    for name, text in phases.items():
        lines.append(f"| {text} | " + " | ".join(f"{laps[name]:.1f}" if name in laps else "" for laps in both) + " |")
    lines.append("| total | " + " | ".join(f"{sum(laps.values()):.1f}" for laps in both) + " |")
    return "\n".join(lines) + "\n"


def _laps(events: list[list[Any]]) -> list[float]:
    times = [when for _, when in events]
    return [b - a for a, b in zip([times[0], *times], times)]


if __name__ == "__main__":
    child(Path(sys.argv[1]))
