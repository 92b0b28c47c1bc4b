"""The model of scalars on disk: its ``model/`` folder, self-contained and free to be moved."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from mvhpc import config
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.loading import load_weights
from mvhpc.models.model_folder import read_weights, save_networks, to_bytes
from mvhpc.models.scalar_stack import Mixing, ScalarStack, build_encoders
from mvhpc.models.site_calibration import SiteCalibration
from mvhpc.models.training_people import TrainingPeople
from mvhpc.models.typicality import Typicality
from mvhpc.variables import Variables
from shards.schema import Schema


@dataclass(frozen=True)
class ScalarsModel:
    """A trained model of scalars.

    Attributes:
        stack: its members and how they are mixed.
        schema: that it was trained with.
        channels: volume -> the packed arrays that are its channels.
        spacing: edge of the cubes that volumes are averaged over, mm.
        typical: volume -> distances of held-out people.
        grid: ``spacing`` (mm), ``shape`` (voxels) and ``affine`` (4 x 4) of the volumes.
        meta: the content of ``model.json``; ``training`` (see :mod:`mvhpc.models.training_people`), ``recipe`` of the
            preprocessing and ``site``, where it was calibrated for one, are there.
        folder: the ``model`` folder.
    """

    stack: ScalarStack
    schema: Schema
    channels: dict[str, list[str]]
    spacing: float
    typical: dict[str, Typicality]
    grid: dict[str, Any]
    meta: dict[str, Any]
    folder: Path

    @property
    def variables(self) -> Variables:
        """Volumes of pooled voxels, and scalars."""
        return self.stack.variables


def save_scalars(
    folder: Path,
    *,
    encoders: Mapping[str, Tensor],
    linear: Sequence[LinearMember],
    mixing: Mapping[str, Mapping[str, Mixing]],
    typical: Mapping[str, Typicality],
    model: config.EncoderConfig,
    smoothing: Sequence[float],
    schema: Schema,
    latent: Mapping[str, Mapping[str, Any]],
    channels: Mapping[str, Sequence[str]],
    intervals: Mapping[str, Sequence[float]],
    grid: Mapping[str, Any],
    training: TrainingPeople,
    recipe: Any,
    extra: Mapping[str, Any],
) -> None:
    """Write a model of scalars whole, in place of any older one.

    Args:
        folder: the ``model`` folder.
        encoders: the state of the 3D encoders; left out where all their weights are 0.
        linear, smoothing: the linear members, and the SD of their features in pooled voxels.
        mixing: scalar -> context -> mixing.
        typical: volume -> distances of held-out people.
        model: the configuration that builds the encoders again.
        schema: of the variables.
        latent: volume -> ``shape`` of pooled voxels, and ``mean`` and ``sd`` of each channel (C, 1, 1, 1).
        channels: volume -> the packed arrays that are its channels.
        intervals: number -> what becomes [-1, 1].
        grid: ``spacing``, ``shape`` and ``affine`` of the packed volumes.
        training: from whom it learnt.
        recipe: of the preprocessing; None where it is not known.
        extra: JSON-able facts to keep beside it.
    """
    meta = {
        "kind": "scalars",
        "schema": schema.to_dict(),
        "encoder": dataclasses.asdict(model),
        "smoothing": list(smoothing),
        "shapes": {name: list(facts["shape"]) for name, facts in latent.items()},
        "channels": {name: list(arrays) for name, arrays in channels.items()},
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "mixing": {
            name: {context: dataclasses.asdict(how) for context, how in of.items()} for name, of in mixing.items()
        },
        "typical": {
            name: {"mean": of.mean.tolist(), "sd": of.sd.tolist(), "people": of.people} for name, of in typical.items()
        },
        "site": None,
        "grid": dict(grid),
        "training": training.to_dict(),
        "recipe": recipe,
        "extra": dict(extra),
    }
    facts = {f"{name}.{moment}": of[moment] for name, of in latent.items() for moment in ("mean", "sd")}
    networks = {f"linear-{i}": to_bytes(member.tensors()) for i, member in enumerate(linear)}
    if any(how.weights[-1] for of in mixing.values() for how in of.values()):
        networks["encoders"] = to_bytes(encoders)
    save_networks(folder, meta, networks | {"facts": to_bytes(facts)})


def load_scalars(folder: Path, meta: dict[str, Any], device: torch.device | str) -> ScalarsModel:
    """The model of a ``model`` folder.

    Raises:
        ModelError: a missing or damaged file.
    """
    schema = Schema.from_dict(meta["schema"])
    facts = from_bytes(read_weights(folder, meta, "facts"))
    volumes = list(meta["shapes"])
    latent = {
        name: {"shape": shape, "mean": facts[f"{name}.mean"], "sd": facts[f"{name}.sd"]}
        for name, shape in meta["shapes"].items()
    }
    variables = Variables.from_schema(schema, latent, meta["intervals"])
    linear = [
        LinearMember.of(variables.scalars, volumes, from_bytes(read_weights(folder, meta, f"linear-{i}")))
        for i in range(len(meta["smoothing"]))
    ]
    encoders = None
    model = config.EncoderConfig(**meta["encoder"])
    if "encoders" in meta["networks"]:
        encoders = build_encoders(variables, model)
        load_weights(encoders, folder, meta, "encoders", device)
    mixing = {name: {context: Mixing.of(how) for context, how in of.items()} for name, of in meta["mixing"].items()}
    site = {
        name: SiteCalibration(tuple(of["shift"]), of["stretch"], of["temperature"], of.get("note", ""))
        for name, of in (meta["site"] or {}).get("scalars", {}).items()
    }
    stack = ScalarStack(variables, meta["smoothing"], linear, encoders, mixing, site)
    typical = {
        name: Typicality(torch.tensor(of["mean"]).double(), torch.tensor(of["sd"]).double(), of["people"])
        for name, of in meta["typical"].items()
    }
    return ScalarsModel(stack, schema, meta["channels"], model.spacing, typical, meta["grid"], meta, folder)


def save_calibrated(model: ScalarsModel, folder: Path, site: Mapping[str, Any], training: TrainingPeople) -> None:
    """Write a copy of a model of scalars that is calibrated for a site.

    Args:
        model: by itself, or as a part of a joint model.
        folder: the ``model`` folder to write.
        site: for ``model.json``: name and people of the site and, under ``scalars``, the calibrations.
        training: from whom the model and its calibration learnt.

    Raises:
        ModelError: a missing or damaged file.
    """
    meta = model.meta
    networks = {name: read_weights(model.folder, meta, name) for name in meta["networks"]}
    kept = {key: value for key, value in meta.items() if key not in ("networks", "format")}
    if training.recorded:
        kept["training"] = training.to_dict()
    save_networks(folder, {**kept, "site": dict(site)}, networks)
