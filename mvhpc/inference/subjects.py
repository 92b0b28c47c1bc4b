"""The people of a packed data set, as a model takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import ConfigError, choose
from mvhpc.diffusion.joint import Batch
from mvhpc.inference.chains import Sampler
from mvhpc.people import scalar_values
from mvhpc.variables import Volume
from shards.loader import Dataset
from shards.schema import Schema, Variable


def check_names(schema: Schema, given: Sequence[str], want: Sequence[str]) -> None:
    """Refuse a question about variables that the model does not have, or that names one twice.

    Raises:
        ConfigError: an unknown variable (naming the nearest), one both given and wanted, or named twice.
    """
    for name in [*given, *want]:
        choose(name, [variable.name for variable in schema], "variable")
        if [*given, *want].count(name) > 1:
            where = "both given and wanted" if name in given and name in want else "named twice"
            raise ConfigError(f"{name} is {where}; name each variable once")


def check_data(
    grid: Mapping[str, Any], schema: Schema, dataset: Dataset, given: Sequence[str], want: Sequence[str] = ()
) -> None:
    """Refuse data that are not as the model saw them.

    Args:
        grid: ``spacing``, ``shape`` and ``affine`` of the model's volumes.
        schema: of the model.
        dataset: packed data.
        given: names of the variables that are known.
        want: and of those that are asked for, which the data need not have.

    Raises:
        ConfigError: latents instead of volumes, a given variable the data lack, one of another kind, unit or contrast,
            or another grid.
    """
    index = dataset.index
    if index.kind != "volumes":
        raise ConfigError(f"{dataset.folder} holds {index.kind}; give the packed volumes they were made from")
    recorded = [variable.name for variable in index.schema]
    for name in given:
        choose(name, recorded, f"variable of {dataset.folder}")
    for name in (*given, *want):
        if name in recorded and (differs := _difference(schema[name], index.schema[name])):
            raise ConfigError(f"{dataset.folder}: {name} {differs}; pack as the data that it was trained on")
    for fact in ("spacing", "shape", "affine"):
        ours, theirs = grid[fact], index.grid[fact]
        if np.shape(ours) != np.shape(theirs) or not np.allclose(ours, theirs, atol=1e-4):
            raise ConfigError(
                f"{dataset.folder} has {fact} {theirs}, the model was trained on {ours}; "
                f"pack again with spacing {grid['spacing']} and shape {grid['shape']}"
            )


def _difference(ours: Variable, theirs: Variable) -> str:
    """In what a recorded variable is another than the model's; empty where in nothing."""
    words = theirs.kind == "categorical"
    if words != (ours.kind == "categorical") and not (words and ours.values):  # numbers may stand for words
        return f"is {theirs.kind} there, {ours.kind} to the model"
    for what, mine, other in (("unit", ours.unit, theirs.unit), ("contrast", ours.suffix, theirs.suffix)):
        if mine and other and mine != other:
            return f"has the {what} {other} there, {mine} to the model"
    return ""


def subjects(dataset: Dataset, part: str, split: str) -> list[str]:
    """Keys of one part of a recorded split: train | validation | test | all.

    Raises:
        ConfigError: an unknown part or split (naming the nearest), or nobody in it.
    """
    choose(part, ["train", "validation", "test", "all"], "part")
    choose(split, list(dataset.index.splits), "split")
    keys = dataset.keys(None if part == "all" else part, split)
    if not keys:
        raise ConfigError(f"{dataset.folder}: the {part} part of split {split!r} is empty")
    return keys


@torch.inference_mode()
def read_given(sampler: Sampler, dataset: Dataset, keys: Sequence[str], names: Sequence[str]) -> tuple[Batch, Batch]:
    """Clean encoded values of some variables, and who has them.

    Args:
        sampler: of the model.
        dataset: packed volumes.
        keys: B people.
        names: of the variables that are given.

    Returns:
        By variable (B, C, h, w, d), (B, 1) or (B,); and (B,) bool.

    Raises:
        ConfigError: a category that the model does not know, and whose.
        IntegrityError: a damaged volume, named.
    """
    schema, variables = sampler.model.schema, sampler.model.variables
    rows = [scalar_values(dataset, key, schema, names) for key in keys]
    given, present = variables.encode_scalars(rows)
    for volume in variables.volumes:
        if volume.name in names:
            latents = [_latent(sampler, dataset, key, volume) for key in keys]
            absent = torch.zeros(1, *volume.shape, device=sampler.device)
            given[volume.name] = torch.cat([absent if z is None else z for z in latents])  # (B, C, h, w, d)
            present[volume.name] = torch.tensor([z is not None for z in latents])
    return {name: given[name] for name in names}, {name: present[name] for name in names}


def _latent(sampler: Sampler, dataset: Dataset, key: str, variable: Volume) -> Tensor | None:
    """The latent (1, C, h, w, d) of one volume; encoded alone, so that it is the same in any batch."""
    if not dataset.has(key, variable.name):
        return None
    voxels = torch.from_numpy(dataset.read(key, variable.name).astype(np.float32))  # (H, W, D)
    return sampler.model.encode(variable.name, voxels[None, None].to(sampler.device))
