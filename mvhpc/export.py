"""Writes a trained model, or that of any checkpoint, as a folder to give away; on one machine and without GPUs."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from mvhpc.checkpoints.compatibility import check
from mvhpc.checkpoints.consolidate import consolidate
from mvhpc.checkpoints.manifest import MANIFEST, Checkpoint, read_checkpoint
from mvhpc.checkpoints.writer import Checkpoints
from mvhpc.config import ConfigError, load_config
from mvhpc.models.bundle import load
from mvhpc.models.known_answer import write_known_answer
from mvhpc.models.model_card import model_card
from mvhpc.models.model_folder import MANIFEST as MODEL
from mvhpc.models.model_folder import read_any_manifest, read_weights, write_sums
from mvhpc.models.monai_bundle import write_monai_bundle
from mvhpc.runs.folder import read_record
from mvhpc.runs.journal import read
from mvhpc.runs.places import without_places
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.importing import resolve
from mvhpc.stages import STAGES, TRAINED
from mvhpc.training.task import Task
from shards.files import atomic_folder


def export(source: Path, out: Path) -> str:
    """Write a model: ``model`` as in a run folder, and around it what its users need.

    The folder holds ``README.md`` (model card), ``configs`` with ``schema.json``, ``recipe.json`` of the preprocessing,
    ``train.yaml`` and the files of a MONAI bundle, ``known_answer.json``, which `mvhpc predict` checks on loading, and
    ``SHA256SUMS`` of all files.

    Args:
        source: a run folder or model folder, whose model is taken as it is, byte for byte; or a checkpoint
            (``RUN/checkpoints/step-NNNNNNNN``) of any number of workers, or a run folder whose training has not ended,
            of which the newest checkpoint is taken. For these the training data must be at the path in the run's
            configuration. A network whose best validation was at that step is bit-identical to the one that training
            exported.
        out: the folder to write.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: there is no model and no checkpoint of a stage that trains, or it does not fit the run's
            configuration.
        ModelError: a damaged model.
        CheckpointError: the checkpoint is damaged.
        FileExistsError: ``out`` exists.
    """
    trained = next((path for path in (source / "model", source) if (path / MODEL).is_file()), None)
    with atomic_folder(out) as part:
        if trained is not None:
            _copy(trained, part / "model")
            words = "the trained model"
        else:
            words = f"the model of step {_of_checkpoint(source, part / 'model')}"
        _describe(part)
        config = _run_of(source) / "config.yaml"
        if config.is_file():
            values = without_places(yaml.safe_load(config.read_text()))
            (part / "configs" / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        write_sums(part)
    return words


def _run_of(source: Path) -> Path:
    """The run folder of a model folder or a checkpoint; ``source`` itself where it is one."""
    folder = source.resolve()
    if (folder / MODEL).is_file():
        return folder.parent
    return folder.parent.parent if (folder / MANIFEST).is_file() else folder


def _copy(folder: Path, out: Path) -> None:
    """Copy the files that a model names, each checked."""
    meta = read_any_manifest(folder)
    out.mkdir()
    for name, entry in meta["networks"].items():
        (out / entry["file"]).write_bytes(read_weights(folder, meta, name))
    (out / MODEL).write_bytes((folder / MODEL).read_bytes())


def _describe(folder: Path) -> None:
    """Write all but the model."""
    model: Any = load(folder)
    meta = read_any_manifest(folder / "model")
    recipe = meta.get("recipe") or (meta.get("scalars") or {}).get("recipe")
    configs = folder / "configs"
    configs.mkdir()
    for name, content in (("schema", meta.get("schema")), ("recipe", recipe)):
        if content:
            (configs / f"{name}.json").write_text(json.dumps(content, indent=1))
    (folder / "README.md").write_text(model_card(meta, recipe))
    write_monai_bundle(folder, model)
    write_known_answer(folder, model)


def _of_checkpoint(source: Path, out: Path) -> int:
    """Write the model folder of a checkpoint; return its step."""
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
    with torch.no_grad():
        task.export(out, states, metrics)
    return checkpoint.step


def _find(source: Path) -> tuple[Checkpoint, Path]:
    """A verified checkpoint, and its run folder."""
    folder = source.resolve()
    checkpoints = Checkpoints(
        folder.parent if (folder / MANIFEST).is_file() else folder / "checkpoints", 1, Collectives()
    )
    checkpoint = read_checkpoint(folder) if (folder / MANIFEST).is_file() else checkpoints.latest()
    if checkpoint is None:
        raise ConfigError(f"{source}: no model there, no checkpoint (a folder with {MANIFEST}), no run that has one")
    checkpoints.verify(checkpoint)
    return checkpoint, checkpoints.folder.parent


def _metrics(run: Path, step: int) -> dict[str, float]:
    """The validation metrics of ``step``; may be empty."""
    events = [e for e in read(run) if e["event"] == "metrics" and e["step"] == step]
    named = {name: value for event in reversed(events) for name, value in event["metrics"].items()}
    return {k.removeprefix("validation/"): v for k, v in named.items() if k.startswith("validation/")}
