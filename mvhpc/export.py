"""Writes the model folder of any checkpoint, on one machine and without GPUs."""

from pathlib import Path
from typing import Any

import torch

from mvhpc.checkpoints.compatibility import check
from mvhpc.checkpoints.consolidate import consolidate
from mvhpc.checkpoints.manifest import MANIFEST, Checkpoint, read_checkpoint
from mvhpc.checkpoints.writer import Checkpoints
from mvhpc.config import ConfigError, load_config
from mvhpc.runs.folder import read_record
from mvhpc.runs.journal import read
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.importing import resolve
from mvhpc.stages import STAGES, TRAINED
from mvhpc.training.task import Task
from shards.files import atomic_folder


def export(source: Path, out: Path) -> int:
    """Write a model with the weights of a checkpoint.

    A network whose best validation was at that step is bit-identical to the one that training exported.

    Args:
        source: a checkpoint (``RUN/checkpoints/step-XXXXXXXX``) of any number of workers, or a run folder, whose newest
            checkpoint is used. The training data must be at the path in the run's configuration.
        out: the folder to write.

    Returns:
        The step of the checkpoint.

    Raises:
        ConfigError: there is no checkpoint of a stage that trains, or it does not fit the run's configuration.
        CheckpointError: the checkpoint is damaged.
        FileExistsError: ``out`` exists.
    """
    checkpoint, run = _find(source)
    name = read_record(run).get("stage", "nothing")
    stage = STAGES.get(name)
    if stage is None or not stage.trains:
        raise ConfigError(f"{run} is a run folder of {name}; a model comes from one of {' or '.join(TRAINED)}")
    config: Any = load_config(stage.config_class(), name, str(run / "config.yaml"), ["compute.device=auto"])
    check(checkpoint, config)
    task: Task = resolve(stage.task)(config)
    states = {}
    for name in task.exported:
        whole = consolidate(checkpoint.folder / name)
        states[name] = {key: value.clone() for key, value in (whole.network | whole.average).items()}
    measured = _metrics(run, checkpoint.step)
    metrics = {name: measured[name] for names in task.exported.values() for name in names if name in measured}
    with atomic_folder(out) as part, torch.no_grad():
        task.export(part, states, metrics)
    return checkpoint.step


def _find(source: Path) -> tuple[Checkpoint, Path]:
    """A verified checkpoint, and its run folder."""
    folder = source.resolve()
    checkpoints = Checkpoints(
        folder.parent if (folder / MANIFEST).is_file() else folder / "checkpoints", 1, Collectives()
    )
    checkpoint = read_checkpoint(folder) if (folder / MANIFEST).is_file() else checkpoints.latest()
    if checkpoint is None:
        raise ConfigError(f"{source}: neither a checkpoint (a folder with {MANIFEST}) nor a run folder that has one")
    checkpoints.verify(checkpoint)
    return checkpoint, checkpoints.folder.parent


def _metrics(run: Path, step: int) -> dict[str, float]:
    """The validation metrics of ``step``; may be empty."""
    events = [e for e in read(run) if e["event"] == "metrics" and e["step"] == step]
    named = {name: value for event in reversed(events) for name, value in event["metrics"].items()}
    return {k.removeprefix("validation/"): v for k, v in named.items() if k.startswith("validation/")}
