"""Trained models on disk: a run's ``model/`` folder, self-contained and free to be moved.

``model.json`` says what to build (configurations, schema, latents, grid); see :mod:`mvhpc.models.model_folder` for its
files. A joint model's folder holds its autoencoder and its model of scalars too.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.baseline import Baseline, scalars_of
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.layers import Values
from mvhpc.models.linear_denoiser import LinearDenoiser
from mvhpc.models.loading import load_weights
from mvhpc.models.model_folder import (
    ModelError,
    check_manifest,
    model_folder,
    read_any_manifest,
    read_manifest,
    read_weights,
    save_networks,
    to_bytes,
)
from mvhpc.models.scalar_bundle import ScalarsModel, load_scalars
from mvhpc.models.training_people import TrainingPeople
from mvhpc.variables import Variables, Volume
from shards.schema import Schema

OF_SCALARS = "scalars-"  # before the names of files of the model of scalars


def save_autoencoder(
    folder: Path, network: Autoencoder, model: config.AutoencoderConfig, extra: Mapping[str, Any] | None = None
) -> None:
    """Write an autoencoder whole, in place of any older one.

    Args:
        folder: the ``model`` folder.
        network: its weights are stored bit for bit.
        model: the configuration that builds it again.
        extra: JSON-able facts to keep beside it (grid, metrics).
    """
    meta = {"kind": "autoencoder", "autoencoder": dataclasses.asdict(model), "extra": dict(extra or {})}
    save_networks(folder, meta, {"autoencoder": to_bytes(network.state_dict())})


class AutoencoderModel(NamedTuple):
    """A trained autoencoder.

    Attributes:
        network: in evaluation mode, without gradients.
        meta: the content of ``model.json`` and, as ``sha256``, the hash of the weights, which identifies it.
    """

    network: Autoencoder
    meta: dict[str, Any]


def _autoencoder(folder: Path, meta: dict[str, Any], device: torch.device | str) -> AutoencoderModel:
    network = Autoencoder(config.AutoencoderConfig(**meta["autoencoder"]))
    load_weights(network, folder, meta, "autoencoder", device)
    return AutoencoderModel(network, {**meta, "sha256": meta["networks"]["autoencoder"]["sha256"]})


def autoencoder_identity(path: str | Path) -> str:
    """SHA-256 of an autoencoder's weights, without reading them.

    Args:
        path: a run folder of stage ``vae``, or its ``model`` folder.

    Raises:
        ModelError: no model there, or another kind of model.
    """
    return str(read_manifest(model_folder(path), "autoencoder")["networks"]["autoencoder"]["sha256"])


@dataclass(frozen=True)
class JointModel:
    """A trained joint model. The weights of each part are read, and checked, when it is first used.

    Attributes:
        variables: the variables in the schema's order, with the latents' shapes, means and SDs.
        schema: the schema it was trained with.
        diffusion: the forward processes and the parameterisation.
        grid: ``spacing`` (mm), ``shape`` (voxels) and ``affine`` (4 x 4) of the volumes.
        meta: the content of ``model.json``.
        folder: the ``model`` folder.
        device: where its networks are put.
    """

    variables: Variables
    schema: Schema
    diffusion: JointDiffusion
    grid: dict[str, Any]
    meta: dict[str, Any]
    folder: Path
    device: torch.device

    @cached_property
    def denoiser(self) -> JointDenoiser:
        """The U-Net, with averaged weights.

        Raises:
            ModelError: a missing or damaged file.
        """
        model = config.DenoiserConfig(**self.meta["model"])
        network = JointDenoiser(self.variables, model, self.diffusion.masked_level)
        load_weights(network, self.folder, self.meta, "denoiser", self.device)
        return network

    @cached_property
    def scalars(self) -> ScalarsModel | None:
        """The model of scalars; None where the U-Net predicts them or there are none.

        Raises:
            ModelError: a missing or damaged file.
        """
        meta = self.meta["scalars"]
        if meta is None:
            return None
        entries = self.meta["networks"].items()
        networks = {name.removeprefix(OF_SCALARS): x for name, x in entries if name.startswith(OF_SCALARS)}
        return load_scalars(self.folder, meta | {"networks": networks}, self.device)

    def denoise(self, z: Values, t: Values, want: Collection[str] | None = None) -> dict[str, Tensor]:
        """f(z, t): the U-Net's outputs and the linear denoiser's, see :class:`~mvhpc.models.denoiser.JointDenoiser`.

        Raises:
            ModelError: a missing or damaged file.
        """
        outputs = self.denoiser(z, t, want)
        return outputs if self.linear is None else self.linear.added_to(outputs, z, t)

    @cached_property
    def linear(self) -> LinearDenoiser | None:
        """The linear part of what is predicted of volumes; None where there is none.

        Raises:
            ModelError: a missing or damaged file.
        """
        if "linear" not in self.meta["networks"]:
            return None
        tensors = from_bytes(read_weights(self.folder, self.meta, "linear"))
        return LinearDenoiser(self.diffusion, tensors).to(self.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Encodes volumes into latents and decodes them.

        Raises:
            ModelError: a missing or damaged file.
        """
        network = Autoencoder(config.AutoencoderConfig(**self.meta["autoencoder"]))
        load_weights(network, self.folder, self.meta, "autoencoder", self.device)
        return network

    def _volume(self, name: str) -> Volume:
        variable = self.variables[name]
        if not isinstance(variable, Volume):
            raise TypeError(f"{name} is no volume; volumes are: {', '.join(v.name for v in self.variables.volumes)}")
        return variable

    def encode(self, name: str, voxels: Tensor) -> Tensor:
        """The scaled latents (B, C, h, w, d) of volumes (B, 1, H, W, D) in [0, 1] of variable ``name``."""
        return self._volume(name).encode(self.autoencoder.encode(voxels)[0])

    def decode(self, name: str, z: Tensor) -> Tensor:
        """Volumes (B, 1, H, W, D) in [0, 1] from scaled latents (B, C, h, w, d) of variable ``name``."""
        return self.autoencoder.decode(self._volume(name).decode(z)).clamp(0, 1)


def save_joint(
    folder: Path,
    denoiser: Mapping[str, Tensor],
    vae: str | Path,
    scalars: str | Path | None = None,
    *,
    model: config.DenoiserConfig,
    diffusion: config.DiffusionConfig,
    schema: Schema,
    latent: Mapping[str, Any],
    intervals: Mapping[str, Sequence[float]] | None = None,
    linear: LinearDenoiser | None = None,
    grid: Mapping[str, Any],
    training: TrainingPeople | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a joint model with copies of its autoencoder and its model of scalars, in place of any older one.

    Args:
        folder: the ``model`` folder.
        denoiser: full state of the U-Net (of averaged weights), stored bit for bit.
        vae: a run folder of stage ``vae``, or its ``model`` folder.
        scalars: the same of stage ``scalars``; None where the U-Net predicts scalars or there are none.
        model, diffusion: the configurations that build the denoiser and the diffusion again.
        schema: of the variables.
        latent: volume variable -> ``shape`` [C, h, w, d] and, as tensors, ``mean`` and ``sd`` of its latents.
        intervals: continuous variable -> what becomes [-1, 1]; the schema's range where not named.
        linear: part of what is predicted of volumes; None: none.
        grid: ``spacing``, ``shape`` and ``affine`` of the volumes.
        training: from whom it learnt; None where that is not known.
        extra: JSON-able facts to keep beside it.

    Raises:
        ModelError: where ``vae`` holds no sound autoencoder, or ``scalars`` no sound model of scalars.
    """
    vae = model_folder(vae)
    autoencoder = read_manifest(vae, "autoencoder")
    of_scalars, parts = _read_scalars(scalars) if scalars else (None, {})
    meta = {
        "kind": "joint",
        "schema": schema.to_dict(),
        "latent": {name: {"shape": list(facts["shape"])} for name, facts in latent.items()},
        "intervals": {name: list(interval) for name, interval in (intervals or {}).items()},
        "grid": dict(grid),
        "training": training and training.to_dict(),
        "autoencoder": autoencoder["autoencoder"],
        "scalars": of_scalars,
        "model": dataclasses.asdict(model),
        "diffusion": dataclasses.asdict(diffusion),
        "extra": dict(extra or {}),
    }
    moments = {f"{name}.{moment}": facts[moment] for name, facts in latent.items() for moment in ("mean", "sd")}
    tensors = {"denoiser": to_bytes(denoiser), "latents": to_bytes(moments)} | parts
    tensors["autoencoder"] = read_weights(vae, autoencoder, "autoencoder")
    if linear is not None:
        tensors["linear"] = to_bytes(linear.state_dict())
    save_networks(folder, meta, tensors)


def _read_scalars(path: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of ``model.json`` of a model of scalars but for its files, and their bytes by name in the joint's."""
    folder = model_folder(path)
    meta = read_manifest(folder, "scalars")
    parts = {OF_SCALARS + name: read_weights(folder, meta, name) for name in meta["networks"]}
    return {key: value for key, value in meta.items() if key != "networks"}, parts


def _joint(folder: Path, meta: dict[str, Any], device: torch.device | str) -> JointModel:
    schema = Schema.from_dict(meta["schema"])
    settings = config.DiffusionConfig(**meta["diffusion"])
    moments = from_bytes(read_weights(folder, meta, "latents"))
    latent = {
        name: facts | {"mean": moments[f"{name}.mean"], "sd": moments[f"{name}.sd"]}
        for name, facts in meta["latent"].items()
    }
    variables = Variables.from_schema(schema, latent, meta["intervals"])
    diffusion = JointDiffusion(variables, settings).to(device)
    return JointModel(variables, schema, diffusion, meta["grid"], meta, folder, torch.device(device))


@dataclass(frozen=True)
class BaselineModel:
    """A network trained for one query, with all that prediction needs.

    Attributes:
        scalars: encodings of the query's scalars.
        schema: of the data it was trained on.
        network: the network.
        name: of the network: densenet, vit or braid.
        given: variables of its input; volumes in the order of its channels.
        want: the scalar that it predicts.
        grid: ``spacing`` (mm), ``shape`` (voxels) and ``affine`` (4 x 4) of the volumes.
        meta: the content of ``model.json``.
    """

    scalars: Variables
    schema: Schema
    network: Baseline
    name: str
    given: list[str]
    want: str
    grid: dict[str, Any]
    meta: dict[str, Any]


def save_baseline(
    folder: Path,
    network: Mapping[str, Tensor],
    *,
    given: Sequence[str],
    want: str,
    name: str,
    settings: config.ViTConfig | config.ResNetConfig | None,
    schema: Schema,
    intervals: Mapping[str, Sequence[float]],
    grid: Mapping[str, Any],
    training: TrainingPeople | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a baseline whole, in place of any older one.

    Args:
        folder: the ``model`` folder.
        network: full state of the network, stored bit for bit.
        given, want: its query.
        name, settings: of the network, see :class:`~mvhpc.models.baseline.Baseline`.
        schema: of the variables.
        intervals: number -> what becomes [-1, 1]; the schema's range where not named.
        grid: ``spacing``, ``shape`` and ``affine`` of the volumes.
        training: from whom it learnt; None where that is not known.
        extra: JSON-able facts to keep beside it.
    """
    meta = {
        "kind": "baseline",
        "given": list(given),
        "want": want,
        "network": {"name": name, "settings": dataclasses.asdict(settings) if settings else None},
        "schema": schema.to_dict(),
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "grid": dict(grid),
        "training": training and training.to_dict(),
        "extra": dict(extra or {}),
    }
    save_networks(folder, meta, {"baseline": to_bytes(network)})


def _baseline(folder: Path, meta: dict[str, Any], device: torch.device | str) -> BaselineModel:
    schema, given, want = Schema.from_dict(meta["schema"]), meta["given"], meta["want"]
    scalars = scalars_of(schema, [*given, want], meta["intervals"])
    of = meta.get("network", {"name": "densenet"})  # earlier versions had no other
    kinds: dict[str, type[config.ViTConfig | config.ResNetConfig]] = {
        "vit": config.ViTConfig,
        "braid": config.ResNetConfig,
    }
    settings = kinds[of["name"]](**of["settings"]) if of["name"] in kinds else None
    network = Baseline(scalars, given, want, settings, meta["grid"]["shape"])
    load_weights(network, folder, meta, "baseline", device)
    return BaselineModel(scalars, schema, network, of["name"], given, want, meta["grid"], meta)


LOADERS: dict[str, Callable[[Path, dict[str, Any], torch.device | str], Any]] = {
    "autoencoder": _autoencoder,
    "joint": _joint,
    "baseline": _baseline,
    "scalars": load_scalars,
}
KINDS = {AutoencoderModel: "autoencoder", JointModel: "joint", BaselineModel: "baseline", ScalarsModel: "scalars"}
M = TypeVar("M", AutoencoderModel, JointModel, BaselineModel, ScalarsModel)


@overload
def load(
    path: str | Path, device: torch.device | str = "cpu"
) -> AutoencoderModel | JointModel | BaselineModel | ScalarsModel: ...
@overload
def load(path: str | Path, device: torch.device | str = "cpu", *, kind: type[M]) -> M: ...
def load(path: str | Path, device: torch.device | str = "cpu", *, kind: type | None = None) -> Any:
    """A trained model, ready for inference.

    Args:
        path: a run folder of a stage that trains, or its ``model`` folder.
        device: where to put its networks and tables.
        kind: the class of model that is needed. None: any, as ``model.json`` says.

    Raises:
        ModelError: no model there, another kind of model or format, or a missing or damaged file, each naming it.
    """
    folder = model_folder(path)
    meta = read_any_manifest(folder)
    check_manifest(folder, meta, KINDS[kind] if kind else meta["kind"])
    return LOADERS[meta["kind"]](folder, meta, device)


def load_model_of_scalars(path: str | Path, device: torch.device | str = "cpu") -> ScalarsModel:
    """The model of scalars in a folder: one of stage ``scalars``, or that of a joint model.

    Args:
        path: a run folder of either stage, or its ``model`` folder.
        device: where to put its networks.

    Raises:
        ModelError: no such model, or a missing or damaged file.
    """
    model = load(path, device)
    found = model.scalars if isinstance(model, JointModel) else model
    if not isinstance(found, ScalarsModel):
        raise ModelError(
            f"{path} has no model of scalars; give the run folder of stage scalars, or of a joint model that has one"
        )
    return found
