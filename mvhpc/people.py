"""What a packed data set says of people, as models take it."""

from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import ConfigError
from mvhpc.diffusion.joint import Batch
from mvhpc.variables import Variables
from shards.loader import Dataset
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

    A model may read a recorded category as a number (``values`` in its schema).

    Raises:
        ConfigError: a category that the model does not know, and whose.
    """
    value = dataset.values(key).get(variable.name)
    if not isinstance(value, str):
        return value
    try:
        return variable.parse(value)
    except ValueError as error:
        raise ConfigError(f"{dataset.folder}: {key}: {error}") from error


def scalar_values(dataset: Dataset, key: str, schema: Schema, names: Container[str]) -> dict[str, float | str | None]:
    """The recorded scalars of one person among ``names``, None where missing.

    Others are not looked at: a site that the model does not know keeps nobody from asking for the age.

    Raises:
        ConfigError: a category that the model does not know, and whose.
    """
    return {v.name: true_value(dataset, key, v) for v in schema.scalars if v.name in names}


def read_people(
    dataset: Dataset, keys: Sequence[str], schema: Schema, volumes: Sequence[str], scalars: Variables
) -> tuple[Tensor, Batch, Batch]:
    """What a baseline takes of people who have all its volumes.

    Args:
        dataset: packed volumes.
        keys: B people.
        schema: of the model.
        volumes: names of V given volumes.
        scalars: encodings of the question's scalars.

    Returns:
        voxels (B, V, H, W, D) float16, and by scalar its encoded values and who has it.

    Raises:
        ConfigError: a category that the model does not know, and whose.
        IntegrityError: a damaged volume, named.
    """
    voxels = np.stack([np.stack([dataset.read(key, name) for name in volumes]) for key in keys])
    values, present = scalars.encode_scalars([scalar_values(dataset, key, schema, scalars.names) for key in keys])
    return torch.from_numpy(voxels), values, present
