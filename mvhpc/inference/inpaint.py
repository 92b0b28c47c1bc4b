"""Stage ``inpaint``: fill in the unknown part of a volume.

The known part is given to the sampler in the latent space, where one cell represents a block of voxels: a cell is known
only if all its voxels are. After decoding, the known voxels are restored.

The autoencoder encodes the whole volume, and its normalisation lets the unknown part change the latents of the known
one. So there are two passes: the first encodes zeros there, the second the completion of the first. A model of scalars
reads the completion of the first pass, and the second is drawn given these scalars.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mvhpc.config import ConfigError, Device, Sampling, Tracking, at_least, choose
from mvhpc.evaluation.figures import inpainting
from mvhpc.inference.generate import Person, caption, decode
from mvhpc.inference.own_grid import encode_nifti, open_own_grid
from mvhpc.inference.sampler import Sampler, parse_given, versions
from mvhpc.inference.scalar_draws import draw_scalars, reads
from mvhpc.models.training_people import SCAN, TrainingPeople
from mvhpc.records import check_data
from mvhpc.runs.folder import Run, identity
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Volume
from shards import nifti, resample, volumes
from shards.dataset import Dataset
from shards.files import atomic_file, write_text
from shards.index import array_checksum
from shards.progress import progress
from shards.qc.limits import verdict

PASSES = 2  # per completion; a third changes little


@dataclass
class InpaintConfig:
    """`mvhpc inpaint`: fill in the part of a volume outside the mask of known voxels."""

    out: str  # a NIfTI file
    model: str
    image: str  # NIfTI
    mask: str  # NIfTI, non-zero where the image is known
    variable: str  # name of the volume; "": the first
    given: dict[str, str]
    samples: int
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples})


def latent_mask(known: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The known latent cells: those of which all voxels are known.

    Args:
        known: bool (H, W, D), the known voxels.
        shape: (h, w, d) of the latent; each divides its axis of ``known``.

    Returns:
        bool (1, 1, h, w, d).
    """
    cell = [size // cells for size, cells in zip(known.shape, shape)]
    unknown = F.max_pool3d((~known)[None, None].float(), cell, cell)  # (1, 1, h, w, d)
    return unknown == 0


@torch.inference_mode()
def complete(
    sampler: Sampler,
    name: str,
    voxels: NDArray,
    known: NDArray,
    given: Mapping[str, float | str] | None = None,
    samples: int = 3,
    seed: int = 0,
) -> list[Person]:
    """Draw completions of one volume, together with the variables that are not given.

    Args:
        sampler: of a joint model.
        name: the volume variable.
        voxels: (H, W, D) in [0, 1] on the model's grid; unknown voxels are not used.
        known: bool (H, W, D).
        given: scalars with fixed values, in their units.
        samples: number of completions.
        seed: of the noise; completion i of a seed is always the same.

    Returns:
        Values by variable for each completion; the known voxels of ``name`` are those of ``voxels``. Scalars that
        are not given are missing where the model of scalars reads tissue maps, which no completion has.

    Raises:
        ConfigError: no voxel is known, or all are.
    """
    if known.all() or not known.any():
        raise ConfigError(f"the mask calls {'every' if known.all() else 'no'} voxel known: nothing to fill in")
    model, device, given = sampler.model, sampler.device, given or {}
    volume = model.variables[name]
    assert isinstance(volume, Volume)
    mask = {name: latent_mask(torch.from_numpy(known), volume.shape[1:]).to(device)}
    people: list[Person] = []
    for i in progress(range(samples), "completions", unit="sample"):
        person: Person = {}
        row: dict[str, Any] = dict(given)
        filled = np.where(known, voxels, 0).astype(np.float32)
        for turn in range(PASSES):
            if turn and model.scalars is not None and reads(model, name):
                (row,) = draw_scalars(model.scalars, given, [generator(seed, "scalars", i)], {name: filled[None]})
            scalars, _ = model.variables.encode_scalars([row])
            fixed = {n: scalars[n] for n in row}  # (1, 1), (1,)
            fixed[name] = model.encode(name, torch.from_numpy(filled)[None, None].to(device))  # (1, C, h, w, d)
            drawn = sampler(fixed, [generator(seed, "inpaint", i)], mask=mask)
            person = row | {n: decode(sampler, n, value) for n, value in drawn.items() if n not in row}
            person[name] = filled = np.where(known, voxels, person[name]).astype(np.float32)
        people.append(person)
    return people


def left_half(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool (H, W, D), True in the left half of a person; the first axis goes to the right."""
    known = np.zeros(shape, bool)
    known[: shape[0] // 2] = True
    return known


def show_completions(
    sampler: Sampler, voxels: NDArray, known: NDArray, people: Sequence[Person], name: str, path: Path
) -> None:
    """Write the figure: original, known part, completions with their scalars."""
    captions = [caption(sampler.model.schema, person) for person in people]
    title = f"one person, {len(people)} completion{'s' * (len(people) > 1)}"
    drawn = [person[name] for person in people]
    inpainting(voxels, known, drawn, path, captions, title, sampler.model.grid["spacing"])


def inpaint_half(sampler: Sampler, dataset: Dataset, key: str, path: Path, samples: int = 3, seed: int = 0) -> None:
    """Fill in the right half of a packed volume from the left one alone, and write the figure.

    Args:
        sampler: of a joint model.
        dataset: packed volumes on the model's grid.
        key: of the record.
        path: PNG file.
        samples: completions.
        seed: of the noise.
    """
    name = sampler.model.schema.volumes[0].name
    check_data(sampler.model.grid, sampler.model.schema, dataset, [name])
    voxels = dataset.read(key, name).astype(np.float32)
    known = left_half(voxels.shape)
    show_completions(
        sampler, voxels, known, complete(sampler, name, voxels, known, samples=samples, seed=seed), name, path
    )


def place(image: Path, mask: Path, grid: Mapping[str, Any]) -> tuple[NDArray, NDArray[np.bool_], NDArray[np.float64]]:
    """Bring a volume to the model's grid as packing does, and its mask with it.

    Args:
        image: NIfTI file.
        mask: NIfTI file in the same space, of any voxel size; non-zero where the image is known. Its border values
            continue outside.
        grid: of the model's volumes, see :func:`shards.volumes.grid`; for a template's space, the image has to be
            registered to it.

    Returns:
        Voxels (H, W, D) in [0, 1], placed and scaled by the whole image, its unknown part included; bool (H, W, D),
        True where known voxels make up at least 99 % of a voxel; and the affine (4, 4) from the grid to the image's
        space, in mm.

    Raises:
        ConfigError: a file that cannot be used, with the reason.
    """
    height, width, depth = grid["shape"]
    centre = volumes.grid_centre(grid)
    space = volumes.Space(grid["space"], tuple(centre)) if "space" in grid else None
    try:
        brain = volumes.canonical(image, grid["spacing"], (height, width, depth), space)
    except (OSError, ValueError) as error:
        raise ConfigError(f"image={image}: {error}") from error
    affine = volumes.place(grid, brain.origin)
    try:
        marked = nifti.read(mask)
    except (OSError, ValueError) as error:
        raise ConfigError(f"mask={mask}: {error}") from error
    there = np.linalg.inv(marked.affine) @ affine  # from the grid's voxels to the mask's
    weight = (marked.voxels != 0).astype(np.float32)
    share = resample.sample(weight, there[:3, :3], there[:3, 3], (height, width, depth), beyond="nearest")
    return brain.voxels.astype(np.float32), share > 0.99, affine


def run(config: InpaintConfig, run: Run) -> dict[str, Any]:
    """Stage ``inpaint``: write the completed volume to ``config.out``, on the image's own grid.

    Known voxels are those of the image, bit for bit; the others have its type and intensities. Several samples are
    written as ``NAME_1.nii.gz``, ``NAME_2.nii.gz`` and so on, each with a JSON beside it.

    Returns:
        The shares of known voxels and latent cells of the model's grid, within [0, 1], and the scalars of each
        completion.

    Raises:
        ConfigError: files or given values that cannot be used, or an unknown variable.
    """
    out = Path(config.out)
    names = [file.name for file in files(config)[: config.samples]]
    ending = names[0].removeprefix(_stem(names[0]))
    sampler = Sampler.of(config)
    schema, grid = sampler.model.schema, sampler.model.grid
    name = choose(config.variable or schema.volumes[0].name, [v.name for v in schema.volumes], "volume")
    given = parse_given(schema, config.given)
    for source in (Path(config.image), Path(config.mask)):
        if source.resolve() in [out.with_name(file).resolve() for file in names]:
            raise ConfigError(f"out={config.out} would take the place of {source}, which is read; name another file")
    voxels, known, affine = place(Path(config.image), Path(config.mask), grid)
    try:
        own = open_own_grid(Path(config.image), Path(config.mask), affine, voxels.shape)
    except ValueError as error:
        raise ConfigError(f"image={config.image}: {error}") from error
    training = TrainingPeople.read(sampler.model.meta)
    warnings = training.beyond(given, schema)
    warnings += [SCAN] if training.knows_scan(array_checksum(voxels.astype("<f2"))) else []
    if reasons := verdict(own.scan.figures(), schema[name].suffix):
        warnings.append(f"the scan is unlike those that are packed: {'; '.join(reasons)}")
    for warning in warnings:
        print(f"{name}: warning: {warning}", file=sys.stderr)
    people = complete(sampler, name, voxels, known, given, config.samples, config.seed)

    out.parent.mkdir(parents=True, exist_ok=True)
    beyond = ~own.known & ~own.inside
    for file, person in zip(files(config), people):
        with atomic_file(file) as part:
            part.write_bytes(encode_nifti(own.fill(person[name]), ending))
        about = {
            "Description": "Known voxels are those of the scan; the others were drawn from a generative model.",
            "SpatialReference": "the scan itself: its grid, type and intensities",
            "Drawn": {v.name: person[v.name] for v in schema.scalars if v.name not in given and v.name in person},
            "Given": given,
            "UnknownVoxels": int((~own.known).sum()),
            "UnknownVoxelsOutsideOfTheModelsBox": int(beyond.sum()),
            "Warnings": warnings,
            "GeneratedBy": {"Name": "mvhpc", "Model": identity(config.model), "Seed": config.seed, **versions()},
        }
        write_text(_sidecar(file), json.dumps(about, indent=1))
    with run.figure("inpainting.png") as path:
        show_completions(sampler, voxels, known, people, name, path)
    volume = sampler.model.variables[name]
    assert isinstance(volume, Volume)
    cells = latent_mask(torch.from_numpy(known), volume.shape[1:])
    summary: dict[str, Any] = {"known_voxels": float(known.mean()), "known_cells": float(cells.float().mean())}
    for title, person in zip(names, people):
        summary[title] = caption(schema, person)
    return summary


def files(config: Any) -> list[Path]:
    """The files of the result of a configuration: a volume for each sample, then their sidecars.

    Raises:
        ConfigError: ``out`` names no NIfTI file.
    """
    out = Path(config.out)
    stem = _stem(out.name)
    ending, count = out.name.removeprefix(stem), config.samples
    found = [out] if count == 1 else [out.with_name(f"{stem}_{i}{ending}") for i in range(1, count + 1)]
    return [*found, *map(_sidecar, found)]


def _stem(name: str) -> str:
    stem = next((name.removesuffix(end) for end in (".nii.gz", ".nii") if name.endswith(end)), None)
    if stem is None:
        raise ConfigError(f"out={name}: the result is a volume, name it with .nii.gz or .nii")
    return stem


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{_stem(file.name)}.json")
