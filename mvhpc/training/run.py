"""Runs the training of a task in its workers."""

from pathlib import Path
from typing import Any

from mvhpc.runs.folder import Run
from mvhpc.runtime.importing import resolve
from mvhpc.runtime.ray_cluster import launch
from mvhpc.training.loop import train


def run_training(task: str, config: Any, run: Run) -> dict[str, float]:
    """Train a task with ``config.compute.workers`` workers.

    Args:
        task: ``module:class`` of a :class:`mvhpc.training.task.Task`.
        config: configuration of the stage.
        run: its run folder.

    Returns:
        metrics of the best validation, number of steps, samples per second.

    Raises:
        ConfigError: the task refuses the configuration or data; raised before anything starts.
    """
    resolve(task).check(config)
    return launch("mvhpc.training.run:train_worker", (task, config), run.folder, config.compute)


def train_worker(settings: tuple[str, Any], folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank`` of ``world``."""
    task, config = settings
    return train(resolve(task)(config), config, folder, rank, world)
