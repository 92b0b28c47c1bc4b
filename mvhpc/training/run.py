"""Runs the training of a task in its workers."""

from functools import partial
from pathlib import Path
from typing import Any

from mvhpc.checkpoints.manifest import resumption
from mvhpc.runs.folder import Run
from mvhpc.runtime.importing import resolve
from mvhpc.runtime.interrupts import interrupts_request
from mvhpc.runtime.ray_cluster import launch
from mvhpc.runtime.watchdog import request_stop, stop_file
from mvhpc.training.loop import train
from shards.index import Index

STOP = ".stop"  # in the run folder


def run_training(task: str, config: Any, run: Run) -> dict[str, float]:
    """Train a task with ``config.compute.workers`` workers. The first Ctrl-C stops it with a checkpoint.

    Args:
        task: ``module:class`` of a :class:`mvhpc.training.task.Task`.
        config: configuration of the stage.
        run: its run folder.

    Returns:
        metrics of the best validation, number of steps, samples per second.

    Raises:
        ConfigError: the task refuses the configuration or data; raised before anything starts.
        Interrupted: stopped on request, after a checkpoint was written.
    """
    resolve(task).check(config)
    run.journal.write("note", text=people(Index.load(getattr(config, "latents", None) or config.data), config.split))
    workers = config.compute.workers
    if workers > 1:
        run.journal.write("note", text=f"starting {workers} workers with Ray; their output is in {run.folder}/logs")
    with stop_file(run.folder / STOP), interrupts_request(request_stop, partial(resumption, run.folder)):
        return launch("mvhpc.training.run:train_worker", (task, config), run.folder, config.compute)


def people(index: Index, split: str) -> str:
    """How many people are in each part of a split, as one line."""
    counts = ", ".join(f"{part} {len(found):,}" for part, found in index.subjects(split).items())
    return f"people by part of the split {split!r}: {counts}"


def train_worker(settings: tuple[str, Any], folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank`` of ``world``."""
    task, config = settings
    return train(resolve(task)(config), config, folder, rank, world)
