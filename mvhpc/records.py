"""Records of a packed data set as inputs of models, and checks that data, model and query fit together."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvhpc.config import ConfigError, choose
from mvhpc.diffusion.joint import Batch
from mvhpc.variables import Variables
from shards.dataset import Dataset
from shards.index import Index
from shards.preprocess.recipe import TISSUES
from shards.schema import Schema, Variable


def volume_shape(dataset: Dataset, names: Sequence[str] = ()) -> tuple[int, ...]:
    """(H, W, D) of the volumes ``names`` of a dataset, of all of them where none is named.

    Raises:
        ConfigError: latents, no volume variable, or volumes of several shapes.
    """
    index = dataset.index
    if index.kind != "volumes":
        raise ConfigError(f"data={dataset.folder} holds {index.kind}, not volumes; pack a BIDS tree: shards pack")
    shapes = {name: tuple(index.arrays[name]["shape"]) for name in names or [v.name for v in index.schema.volumes]}
    if len(set(shapes.values())) != 1:
        raise ConfigError(f"data={dataset.folder}: one network needs volumes of one shape, found {shapes}")
    return next(iter(shapes.values()))


def true_value(dataset: Dataset, key: str, variable: Variable) -> float | str | None:
    """The recorded value of a scalar, as ``variable`` reads it; None where it is missing.

    A model may take a recorded category as a number (``values`` in its schema).

    Raises:
        ConfigError: a category that the model does not have, with its record.
    """
    value = dataset.values(key).get(variable.name)
    if not isinstance(value, str):
        return value
    try:
        return variable.parse(value)
    except ValueError as error:
        raise ConfigError(f"{dataset.folder}: {key}: {error}") from error


def scalar_values(dataset: Dataset, key: str, schema: Schema, names: Container[str]) -> dict[str, float | str | None]:
    """The recorded scalars of one record among ``names``, None where missing.

    Others are not parsed: a site that the model does not have is no obstacle to a prediction of the age.

    Raises:
        ConfigError: a category that the model does not have, with its record.
    """
    return {v.name: true_value(dataset, key, v) for v in schema.scalars if v.name in names}


def read_volumes(dataset: Dataset, samples: Sequence[tuple[str, str]]) -> Tensor:
    """Volumes of one shape, (B, H, W, D) float16, read without a copy; into pinned memory where training uses a GPU.

    Args:
        dataset: packed volumes.
        samples: B pairs of key and volume.

    Raises:
        IntegrityError: a damaged volume, with its record.
    """
    shape = dataset.index.arrays[samples[0][1]]["shape"]
    found = torch.empty(len(samples), *shape, dtype=torch.float16, pin_memory=torch.cuda.is_initialized())
    for volume, (key, name) in zip(found.numpy(), samples):
        dataset.read(key, name, out=volume)
    return found


def read_people(
    dataset: Dataset, keys: Sequence[str], schema: Schema, volumes: Sequence[str], scalars: Variables
) -> tuple[Tensor, Batch, Batch]:
    """The inputs of a baseline for records that have all its volumes.

    Args:
        dataset: packed volumes.
        keys: of B records.
        schema: of the model.
        volumes: names of V given volumes.
        scalars: encodings of the query's scalars.

    Returns:
        voxels (B, V, H, W, D) float16; by scalar, encoded values and presence (B,) bool.

    Raises:
        ConfigError: a category that the model does not have, with its record.
        IntegrityError: a damaged volume, with its record.
    """
    voxels = read_volumes(dataset, [(key, name) for key in keys for name in volumes])
    values, present = scalars.encode_scalars([scalar_values(dataset, key, schema, scalars.names) for key in keys])
    return voxels.unflatten(0, (len(keys), len(volumes))), values, present


def channels_of(index: Index, volume: str) -> list[str]:
    """The arrays that scalars are read from, of a volume: its tissue maps, or itself where it has none."""
    return [name for name in (f"{volume}_{tissue}" for tissue in TISSUES) if name in index.arrays] or [volume]


def read_pooled(dataset: Dataset, key: str, names: Sequence[str], spacing: float) -> Tensor:
    """Arrays of one record as channels, averaged over cubes of about ``spacing``.

    Args:
        dataset: packed volumes.
        key: of a record that has the arrays.
        names: of C arrays of one shape (H, W, D), such as :func:`channels_of` a volume; uint8 stands for [0, 1].
        spacing: edge of the cubes, mm; rounded to whole voxels, at least one.

    Returns:
        (C, ceil(H / n), ceil(W / n), ceil(D / n)) float32 in [0, 1].

    Raises:
        IntegrityError: a damaged array, with its record.
    """
    arrays = [torch.from_numpy(np.array(dataset.read(key, name))) for name in names]
    x = torch.stack([a.float() / 255 if a.dtype is torch.uint8 else a.float() for a in arrays])  # (C, H, W, D)
    return pool(x, cube(dataset.index.grid, spacing))


def pool(x: Tensor, n: int) -> Tensor:
    """Volumes (..., H, W, D) averaged over cubes of n voxels, zeros beyond: (..., ceil(H / n), ...)."""
    rest = [(-size) % n for size in x.shape[-3:]]
    x = F.pad(x, [edge for r in reversed(rest) for edge in (0, r)])
    return F.avg_pool3d(x, n) if n > 1 else x


def cube(grid: Mapping[str, Any], spacing: float) -> int:
    """How many voxels of a grid are about ``spacing`` mm; at least one."""
    return max(1, round(spacing / float(grid["spacing"])))


def check_names(schema: Schema, given: Sequence[str], want: Sequence[str]) -> None:
    """Refuse a query about variables that the model does not have, or that names one twice.

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
    """Refuse data that differ from those that a model was trained on.

    Args:
        grid: ``spacing``, ``shape`` and ``affine`` of the model's volumes.
        schema: of the model.
        dataset: packed data.
        given: names of the given variables.
        want: names of the wanted variables, which the data need not have.

    Raises:
        ConfigError: latents instead of volumes, a given variable that the data lack, one of another kind, unit or
            contrast, or another grid.
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
    check_grid(grid, dataset)


def check_grid(grid: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse data on another grid than a model was trained on.

    Args:
        grid: ``spacing``, ``shape`` and ``affine`` of the model's volumes.
        dataset: packed data.

    Raises:
        ConfigError: naming what differs.
    """
    for fact in ("spacing", "shape", "affine"):
        ours, theirs = grid[fact], dataset.index.grid[fact]
        if np.shape(ours) != np.shape(theirs) or not np.allclose(ours, theirs, atol=1e-4):
            remedy = f"pack again with spacing {grid['spacing']} and shape {grid['shape']}"
            space = grid.get("space")
            if space != dataset.index.grid.get("space"):
                remedy += f" what `shards preprocess` registers to {space}" if space else " scans as they come"
            raise ConfigError(f"{dataset.folder} has {fact} {theirs}, the model was trained on {ours}; {remedy}")


def _difference(ours: Variable, theirs: Variable) -> str:
    """How a recorded variable differs from the model's; empty where it does not."""
    words = theirs.kind == "categorical"
    if words != (ours.kind == "categorical") and not (words and ours.values):  # a schema may map classes to numbers
        return f"is {theirs.kind} there, {ours.kind} to the model"
    for what, mine, other in (("unit", ours.unit, theirs.unit), ("contrast", ours.suffix, theirs.suffix)):
        if mine and other and mine != other:
            return f"has the {what} {other} there, {mine} to the model"
    return ""


def choose_part(part: str, auto: bool = False) -> None:
    """Refuse an unknown part of a split; ``auto`` says whether that word is one.

    Raises:
        ConfigError: naming the nearest part.
    """
    choose(part, ["train", "validation", "test", "all", *["auto"] * auto], "part")


def subjects(dataset: Dataset, part: str, split: str) -> list[str]:
    """Keys of one part of a recorded split: train | validation | test | all.

    Raises:
        ConfigError: an unknown part or split (naming the nearest), or an empty part.
    """
    choose_part(part)
    choose(split, list(dataset.index.splits), "split")
    keys = dataset.keys(None if part == "all" else part, split)
    if not keys:
        raise ConfigError(f"{dataset.folder}: the {part} part of split {split!r} is empty; name another one")
    return list(keys)
