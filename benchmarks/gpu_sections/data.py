"""Data for the measurements: random numbers where only the size matters, phantoms where training is compared."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu_sections.settings import Settings
from mvhpc.config import fingerprint
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, load, save_autoencoder
from mvhpc.models.scalar_stack import CONTEXTS, Mixing
from mvhpc.training.joint import JointTask
from mvhpc.training.scalars import ScalarsTask
from shards.index import Split
from shards.schema import Schema
from shards.writer import DatasetWriter

VOLUMES = 8  # random ones: training reads them again and again


def volumes(folder: Path, settings: Settings) -> str:
    """A data set of random volumes, made where it is missing."""
    return _write(folder / "volumes", "volumes", settings.voxels, VOLUMES, settings)


def scalars(folder: Path, settings: Settings) -> str:
    """The run folder of a model of scalars of the random volumes, made where it is missing. Its encoders are untrained;
    they have the weight of a linear member, while stacking would leave them out."""
    out = folder / "scalars"
    if not out.is_dir():
        config = settings.scalars_config(data=volumes(folder, settings))
        task, members = ScalarsTask(config), len(config.linear.smoothing) + 1
        equal = dict.fromkeys(CONTEXTS, Mixing((1 / members,) * members, 1.0))
        mixing = {v.name: equal for v in task.variables.scalars}
        with patch("mvhpc.training.scalars.stack_members", return_value=mixing):
            task.export(out / "model", {name: x.state_dict() for name, x in task.networks.items()}, {})
    return str(out)


def latents(folder: Path, settings: Settings) -> dict[str, str]:
    """A data set of random latents, an untrained autoencoder of their shape and a model of scalars, made where they are
    missing.

    Returns:
        The keys ``latents``, ``vae`` and ``scalars`` of the joint stage.
    """
    vae, model = folder / "vae", settings.vae_config().model
    if not vae.is_dir():
        torch.manual_seed(0)
        save_autoencoder(vae / "model", Autoencoder(model), model)
    autoencoder, meta = load(vae, kind=AutoencoderModel)
    shape = autoencoder.latent_shape(settings.voxels)
    data = _write(folder / "latents", "latents", shape, settings.samples, settings, meta["sha256"])
    return {"latents": data, "vae": str(vae), "scalars": scalars(folder, settings)}


def untrained_model(folder: Path, settings: Settings) -> str:
    """The run folder of an untrained joint model."""
    task = JointTask(settings.joint_config(**latents(folder, settings)))
    states = {name: network.state_dict() for name, network in task.networks.items()}
    task.export(folder / "joint" / "model", states, {})
    return str(folder / "joint")


def _write(
    folder: Path, kind: str, shape: tuple[int, ...], train: int, settings: Settings, autoencoder: str = ""
) -> str:
    """``train`` records of the training part and half as many of the validation part; of latents by ``autoencoder``."""
    if (folder / "index.json").is_file():
        return str(folder)
    grid = {"spacing": 1.0, "shape": list(settings.voxels), "affine": np.eye(4).tolist()}
    arrays = {"image": {"shape": shape, "dtype": "float16"}}
    writer = DatasetWriter(folder, "zarr", kind, Schema.load(), arrays, grid)
    rng, parts = np.random.default_rng(0), dict[str, str]()
    for i in range(train + train // 2):
        values: dict[str, float | str | None] = {"age": float(rng.uniform(20, 80)), "sex": "FM"[int(rng.integers(2))]}
        image = rng.random(shape, np.float32).astype(np.float16)
        key = f"sub-{i:04d}"
        writer.add(key, key, values, {"image": image})
        parts[key] = "train" if i < train else "validation"
    training = fingerprint(sorted(key for key, part in parts.items() if part == "train"))
    extra = {"scale": {"image": 1.0}, "vae": autoencoder, "training": training} if autoencoder else {}
    writer.finish({"default": Split("fractions", 0, [0.7, 0.3, 0.0], [], "", parts)}, extra=extra)
    return str(folder)
