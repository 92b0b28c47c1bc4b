"""Any checkpoint of a trained network as a model folder, on one machine and without GPUs."""

import importlib
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.devices import resolve_device, resolve_precision
from mvhpc.journal import read
from mvhpc.run import record
from mvhpc.stages import STAGES
from mvhpc.training.agreement import agree
from mvhpc.training.checkpoint import Checkpoints
from mvhpc.training.manifest import MANIFEST, Checkpoint, read_checkpoint
from mvhpc.training.ranks import Ranks
from mvhpc.training.task import Task
from mvhpc.training.whole import read_whole
from shards.files import whole_folder

TASKS = {
    "vae": "mvhpc.training.vae:VAETask",
    "joint": "mvhpc.training.joint:JointTask",
    "baseline": "mvhpc.training.baseline:BaselineTask",
}


def export(source: Path, out: Path) -> int:
    """Write the model of a checkpoint, the same bits as training itself exports at that step.

    Args:
        source: a checkpoint (``RUN/checkpoints/step-XXXXXXXX``) of any number of workers, or a run folder, whose newest
            checkpoint is taken. The data that the run was trained on must be where its configuration says.
        out: the folder to write.

    Returns:
        the step of the checkpoint.

    Raises:
        ConfigError: there is no checkpoint of a stage that trains a model, or it is not of the run's configuration.
        CheckpointError: a damaged one.
        FileExistsError: ``out`` is there already.
    """
    checkpoint, run = _find(source)
    stage = record(run).get("stage", "nothing")
    if stage not in TASKS:
        raise ConfigError(f"{run} is a run folder of {stage}; a model comes from one of {' or '.join(TASKS)}")
    config: Any = load_config(STAGES[stage].config, stage, str(run / "config.yaml"), ["compute.device=auto"])
    agree(checkpoint, config)
    module, name = TASKS[stage].split(":")
    task: Task = getattr(importlib.import_module(module), name)(config)
    whole = read_whole(checkpoint.folder / task.best)
    states = {task.best: {name: value.clone() for name, value in (whole.network | whole.average).items()}}
    device = resolve_device(config.compute.device)
    dtype = resolve_precision(config.compute.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with whole_folder(out) as part, torch.no_grad(), autocast:  # as during training
        task.export(part, states, _metrics(run, checkpoint.step))
    return checkpoint.step


def _find(source: Path) -> tuple[Checkpoint, Path]:
    """A checkpoint, found whole, and its run folder."""
    folder = source.resolve()
    checkpoints = Checkpoints(folder.parent if (folder / MANIFEST).is_file() else folder / "checkpoints", 1, Ranks())
    checkpoint = read_checkpoint(folder) if (folder / MANIFEST).is_file() else checkpoints.latest()
    if checkpoint is None:
        raise ConfigError(f"{source}: neither a checkpoint (a folder with {MANIFEST}) nor a run folder that has one")
    checkpoints.verify(checkpoint)
    return checkpoint, checkpoints.folder.parent


def _metrics(run: Path, step: int) -> dict[str, float]:
    """What validation said at ``step``; empty where there was none."""
    events = [e for e in read(run) if e["event"] == "metrics" and e["step"] == step]
    named = {name: value for event in reversed(events) for name, value in event["metrics"].items()}
    return {k.removeprefix("validation/"): v for k, v in named.items() if k.startswith("validation/")}
