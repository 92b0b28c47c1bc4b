"""What a model answers about a volume that anybody can make, recorded on export and computed again on loading.

It shows that the packages and the machine at hand compute what those of the export computed. The hashes of the weights
are checked in any case (:mod:`mvhpc.models.model_folder`).
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvhpc.diffusion.laws import Law
from mvhpc.models.bundle import BaselineModel, JointModel
from mvhpc.models.model_folder import ModelError, model_folder
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.runtime.devices import one_thread
from mvhpc.variables import Variables

FILE = "known_answer.json"  # beside the folder `model`
TOLERANCE = 0.01  # of encoded numbers, whose range is [-1, 1], and of probabilities; TF32 and bfloat16 stay below
Answer = dict[str, list[float]]


def ellipsoid(shape: Sequence[int]) -> Tensor:
    """A textured ellipsoid in an empty box, by arithmetic of integers alone.

    Args:
        shape: (H, W, D).

    Returns:
        (H, W, D) uint8.
    """
    axes = np.meshgrid(*(np.arange(n, dtype=np.int64) for n in shape), indexing="ij")
    squares = sum(((2 * i + 1 - n) * 1000 // n) ** 2 for i, n in zip(axes, shape, strict=True))
    texture = 100 + (7 * axes[0] + 11 * axes[1] + 13 * axes[2]) % 156
    return torch.from_numpy(np.where(squares < 700_000, texture, 0).astype(np.uint8))


def write_known_answer(folder: Path, model: Any) -> None:
    """Record the answer of a model that predicts scalars; of an autoencoder nothing.

    Args:
        folder: which holds ``model``.
        model: as :func:`mvhpc.models.bundle.load` returns it.
    """
    shape = _shape(model)
    if shape is not None:
        content = {
            "description": "answer of the model about mvhpc.models.known_answer.ellipsoid, which is checked on loading",
            "input": {"shape": list(shape), "sha256": _digest(shape)},
            "answer": _answer(model, shape),
            "tolerance": TOLERANCE,
            "versions": {name: version(name) for name in ("mvhpc", "torch", "monai", "numpy")},
        }
        (folder / FILE).write_text(json.dumps(content, indent=1))


def check_known_answer(path: str | Path, model: Any) -> None:
    """Compute the recorded answer again, where there is one.

    Args:
        path: of the model, as :func:`mvhpc.models.bundle.load` takes it.
        model: which that returned.

    Raises:
        ModelError: another answer, or a damaged file.
    """
    file = model_folder(path).parent / FILE
    if not file.is_file():
        return
    try:
        recorded = json.loads(file.read_text())
        digest, shape = recorded["input"]["sha256"], recorded["input"]["shape"]
        expected, tolerance, versions = recorded["answer"], float(recorded["tolerance"]), recorded["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: damaged: {error!r}; copy the folder again") from error
    if _digest(shape) != digest:
        raise ModelError(f"{file}: this version of mvhpc makes another input; take version {versions.get('mvhpc')}")
    found = _answer(model, shape)
    for name in sorted({*expected, *found}):
        ours, theirs = np.array(found.get(name, [])), np.array(expected.get(name, []))
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
            raise ModelError(
                f"{file}: the model answers {ours.tolist()} for {name} here, and {theirs.tolist()} where it was "
                f"exported (with {', '.join(f'{key} {value}' for key, value in versions.items())}); use those versions"
            )


def _digest(shape: Sequence[int]) -> str:
    return hashlib.sha256(ellipsoid(shape).numpy().tobytes()).hexdigest()


def _shape(model: Any) -> tuple[int, ...] | None:
    """Of the input: pooled voxels, voxels or latents, as the model reads them; None where it predicts no scalars."""
    if isinstance(model, BaselineModel):
        return tuple(model.grid["shape"])
    if isinstance(model, JointModel) and model.scalars is None:
        known = model.variables.volumes and model.variables.scalars
        return tuple(model.variables.volumes[0].shape[1:]) if known else None
    scalars = _scalars(model)
    return tuple(scalars.variables.volumes[0].shape[1:]) if scalars else None


def _scalars(model: Any) -> ScalarsModel | None:
    if isinstance(model, JointModel):
        return model.scalars
    return model if isinstance(model, ScalarsModel) else None


@torch.inference_mode()
@one_thread()
def _answer(model: Any, shape: Sequence[int]) -> Answer:
    """Encoded means and SDs of numbers, and probabilities of classes, given the volumes alone."""
    voxels = ellipsoid(shape).float() / 255
    if isinstance(model, BaselineModel):
        return _of_baseline(model, voxels)
    scalars = _scalars(model)
    return _of_chains(model, voxels) if scalars is None else _of_scalars(scalars, voxels)


def _unknown(variables: Variables, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoded scalars of somebody of whom nothing is known, and their presence."""
    values, present = variables.encode_scalars([{}])
    return {k: x.to(device) for k, x in values.items()}, {k: x.to(device) for k, x in present.items()}


def _of_scalars(model: ScalarsModel, voxels: Tensor) -> Answer:
    values, known = _unknown(model.variables)
    pooled = {v.name: voxels.expand(1, *v.shape[:1], *voxels.shape) / v.shape[0] for v in model.variables.volumes}
    known |= {v.name: torch.ones(1, dtype=torch.bool) for v in model.variables.volumes}
    laws = StackPosterior(model.stack, pooled, values, known).laws([v.name for v in model.variables.scalars])
    return {name: _numbers(law) for name, law in laws.items()}


def _numbers(law: Law) -> list[float]:
    return law[0].tolist() if isinstance(law, Tensor) else [float(law.mean[0]), float(law.stddev[0])]


def _of_baseline(model: BaselineModel, voxels: Tensor) -> Answer:
    device = next(model.network.parameters()).device
    volumes = sum(model.schema[name].kind == "volume" for name in model.given)
    inputs = voxels.expand(1, volumes, *voxels.shape).to(device)
    output = model.network(inputs, *_unknown(model.scalars, device)).double().cpu()
    return {model.want: (output.softmax(1) if model.schema[model.want].kind == "categorical" else output)[0].tolist()}


def _of_chains(model: JointModel, latents: Tensor) -> Answer:
    """What the U-Net predicts of the scalars, which are noise, given clean latents."""
    device, last = model.device, model.meta["diffusion"]["steps"]
    z, _ = _unknown(model.variables, device)
    z |= {v.name: (2 * latents - 1).expand(1, *v.shape).to(device) for v in model.variables.volumes}
    levels = dict.fromkeys(z, last if model.meta["diffusion"]["time"] == "shared" else 0)
    levels |= {v.name: last for v in model.variables.scalars}
    t = {name: torch.full((1,), level, device=device) for name, level in levels.items()}
    found = model.denoise(z, t, [v.name for v in model.variables.scalars])
    return {name: (x.softmax(1) if x.shape[1] > 1 else x)[0].double().cpu().tolist() for name, x in found.items()}
