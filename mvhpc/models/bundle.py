"""Trained models on disk: a run's ``model/`` folder, self-contained and free to be moved.

``model.json`` says what to build (configurations, schema, latents, grid) and names each safetensors file (weights of a
network, moments of the latents) with its SHA-256. It is renamed into place after the files it names, so that a reader
finds the old model or the new one, never a mixture. A joint model's folder holds its autoencoder too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save
from torch import Tensor, nn

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.baseline import Baseline, scalars_of
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.channels_last import lay_out
from mvhpc.models.kernels.cpu_conv3d import mend_convolutions
from mvhpc.variables import Variables, Volume
from shards.files import write_bytes
from shards.schema import Schema

FORMATS = {"autoencoder": 3, "joint": 6, "baseline": 1}  # each counts what changed in its own files
MANIFEST = "model.json"


class ModelError(config.ConfigError):
    """A model folder that cannot be used; the message names the file."""


def model_folder(path: str | Path) -> Path:
    """The folder that holds ``model.json``: ``path`` itself, or its ``model`` where ``path`` is a run folder.

    Raises:
        ModelError: where neither holds one.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / MANIFEST).is_file():
            return folder
    raise ModelError(f"{path}: no trained model there (no {MANIFEST}); give a run folder whose training has ended")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        _ = meta["format"], meta["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged: {error!r}; train the model again or copy the folder again") from error
    return meta


def _manifest(folder: Path, kind: str) -> dict[str, Any]:
    meta = _read(folder)
    _check(folder, meta, kind)
    return meta


def _check(folder: Path, meta: dict[str, Any], kind: str) -> None:
    path = folder / MANIFEST
    if kind not in FORMATS:
        raise ModelError(f"{path}: a model of the unknown kind {kind}; take the version of mvhpc that wrote it")
    if meta["kind"] != kind:
        raise ModelError(f"{path}: this model is of the kind {meta['kind']}; one of the kind {kind} is needed here")
    if meta["format"] != FORMATS[kind]:
        raise ModelError(
            f"{path}: in format {meta['format']}, this version reads {FORMATS[kind]}; train the model again, or take "
            "the version that wrote it"
        )


def _save(folder: Path, meta: dict[str, Any], networks: Mapping[str, bytes]) -> None:
    """Write ``networks`` (safetensors bytes by name), then ``model.json``, then drop what it no longer names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, data in networks.items():
        digest = hashlib.sha256(data).hexdigest()
        files[name] = {"file": f"{name}-{digest[:12]}.safetensors", "sha256": digest}
        write_bytes(folder / files[name]["file"], data)
    manifest = json.dumps({"format": FORMATS[meta["kind"]], **meta, "networks": files}, indent=1)
    write_bytes(folder / MANIFEST, manifest.encode())
    named = {entry["file"] for entry in files.values()}
    for path in folder.glob("*.safetensors"):
        if path.name not in named:
            path.unlink()


def _weights(folder: Path, meta: dict[str, Any], name: str) -> bytes:
    """The bytes of a network's weights file, checked against ``model.json``."""
    entry = meta["networks"][name]
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: weights missing ({error.strerror}); copy the whole model folder again") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ModelError(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}; copy it again")
    return data


def _bytes(state: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def _build(network: nn.Module, data: bytes, device: torch.device | str) -> None:
    network.load_state_dict(from_bytes(data))
    network.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        mend_convolutions(network)
    else:
        lay_out(network)


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
    _save(folder, meta, {"autoencoder": _bytes(network.state_dict())})


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
    _build(network, _weights(folder, meta, "autoencoder"), device)
    return AutoencoderModel(network, {**meta, "sha256": meta["networks"]["autoencoder"]["sha256"]})


@dataclass(frozen=True)
class JointModel:
    """A trained joint model with all that sampling and decoding need.

    Attributes:
        variables: the variables in the schema's order, with the latents' shapes, means and SDs.
        schema: the schema it was trained with.
        diffusion: the forward processes and the parameterisation.
        denoiser: the network, with averaged weights.
        autoencoder: turns volumes into latents and back.
        grid: ``spacing`` (mm), ``shape`` (voxels) and ``affine`` (4 x 4) of the volumes.
        temperature: by scalar, how much wider its posterior is than training alone says; see
            :mod:`mvhpc.training.calibration`.
        meta: the content of ``model.json``.
    """

    variables: Variables
    schema: Schema
    diffusion: JointDiffusion
    denoiser: JointDenoiser
    autoencoder: Autoencoder
    grid: dict[str, Any]
    temperature: dict[str, float]
    meta: dict[str, Any]

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
    *,
    model: config.DenoiserConfig,
    diffusion: config.DiffusionConfig,
    schema: Schema,
    latent: Mapping[str, Any],
    intervals: Mapping[str, Sequence[float]] | None = None,
    temperature: Mapping[str, float] | None = None,
    grid: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a joint model whole, with a copy of its autoencoder, in place of any older one.

    Args:
        folder: the ``model`` folder.
        denoiser: full state of the denoiser (the averaged weights), stored bit for bit.
        vae: a run folder of stage ``vae``, or its ``model`` folder.
        model, diffusion: the configurations that build the denoiser and the diffusion again.
        schema: of the variables.
        latent: volume variable -> ``shape`` [C, h, w, d] and, as tensors, ``mean`` and ``sd`` of its latents.
        intervals: continuous variable -> what becomes [-1, 1]; the schema's range where not named.
        temperature: of the posterior, by scalar; 1 where not named.
        grid: ``spacing``, ``shape`` and ``affine`` of the volumes.
        extra: JSON-able facts to keep beside it.

    Raises:
        ModelError: where ``vae`` holds no sound autoencoder.
    """
    vae = model_folder(vae)
    autoencoder = _manifest(vae, "autoencoder")
    meta = {
        "kind": "joint",
        "schema": schema.to_dict(),
        "latent": {name: {"shape": list(facts["shape"])} for name, facts in latent.items()},
        "intervals": {name: list(interval) for name, interval in (intervals or {}).items()},
        "spread": dict(temperature or {}),
        "grid": dict(grid),
        "autoencoder": autoencoder["autoencoder"],
        "denoiser": dataclasses.asdict(model),
        "diffusion": dataclasses.asdict(diffusion),
        "extra": dict(extra or {}),
    }
    moments = {f"{name}.{moment}": facts[moment] for name, facts in latent.items() for moment in ("mean", "sd")}
    tensors = {
        "autoencoder": _weights(vae, autoencoder, "autoencoder"),
        "denoiser": _bytes(denoiser),
        "latents": _bytes(moments),
    }
    _save(folder, meta, tensors)


def _joint(folder: Path, meta: dict[str, Any], device: torch.device | str) -> JointModel:
    schema = Schema.from_dict(meta["schema"])
    settings = config.DiffusionConfig(**meta["diffusion"])
    moments = from_bytes(_weights(folder, meta, "latents"))
    latent = {
        name: facts | {"mean": moments[f"{name}.mean"], "sd": moments[f"{name}.sd"]}
        for name, facts in meta["latent"].items()
    }
    variables = Variables.from_schema(schema, latent, meta["intervals"])
    autoencoder = Autoencoder(config.AutoencoderConfig(**meta["autoencoder"]))
    _build(autoencoder, _weights(folder, meta, "autoencoder"), device)
    diffusion = JointDiffusion(variables, settings).to(device)
    denoiser = JointDenoiser(variables, config.DenoiserConfig(**meta["denoiser"]), diffusion.masked_level)
    _build(denoiser, _weights(folder, meta, "denoiser"), device)
    return JointModel(variables, schema, diffusion, denoiser, autoencoder, meta["grid"], meta["spread"], meta)


def read_denoiser(folder: str | Path) -> dict[str, Tensor]:
    """The denoiser's weights alone.

    Raises:
        ModelError: as :func:`load`.
    """
    folder = model_folder(folder)
    return from_bytes(_weights(folder, _manifest(folder, "joint"), "denoiser"))


@dataclass(frozen=True)
class BaselineModel:
    """A network trained for one question, with all that asking it needs.

    Attributes:
        scalars: encodings of the question's scalars.
        schema: of the data it was trained on.
        network: the network.
        given: what it is told; the volumes in the order of its channels.
        want: what it answers.
        grid: ``spacing`` (mm), ``shape`` (voxels) and ``affine`` (4 x 4) of the volumes.
        meta: the content of ``model.json``.
    """

    scalars: Variables
    schema: Schema
    network: Baseline
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
    schema: Schema,
    intervals: Mapping[str, Sequence[float]],
    grid: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a baseline whole, in place of any older one.

    Args:
        folder: the ``model`` folder.
        network: full state of the network, stored bit for bit.
        given, want: its question.
        schema: of the variables.
        intervals: number -> what becomes [-1, 1]; the schema's range where not named.
        grid: ``spacing``, ``shape`` and ``affine`` of the volumes.
        extra: JSON-able facts to keep beside it.
    """
    meta = {
        "kind": "baseline",
        "given": list(given),
        "want": want,
        "schema": schema.to_dict(),
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "grid": dict(grid),
        "extra": dict(extra or {}),
    }
    _save(folder, meta, {"baseline": _bytes(network)})


def _baseline(folder: Path, meta: dict[str, Any], device: torch.device | str) -> BaselineModel:
    schema, given, want = Schema.from_dict(meta["schema"]), meta["given"], meta["want"]
    scalars = scalars_of(schema, [*given, want], meta["intervals"])
    network = Baseline(scalars, given, want)
    _build(network, _weights(folder, meta, "baseline"), device)
    return BaselineModel(scalars, schema, network, given, want, meta["grid"], meta)


LOADERS: dict[str, Callable[[Path, dict[str, Any], torch.device | str], Any]] = {
    "autoencoder": _autoencoder,
    "joint": _joint,
    "baseline": _baseline,
}
KINDS = {AutoencoderModel: "autoencoder", JointModel: "joint", BaselineModel: "baseline"}
M = TypeVar("M", AutoencoderModel, JointModel, BaselineModel)


@overload
def load(path: str | Path, device: torch.device | str = "cpu") -> AutoencoderModel | JointModel | BaselineModel: ...
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
    meta = _read(folder)
    _check(folder, meta, KINDS[kind] if kind else meta["kind"])
    return LOADERS[meta["kind"]](folder, meta, device)
