"""What the joint diffusion is trained on: latents and scalars of all people, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import ConfigError
from mvhpc.records import scalar_values
from mvhpc.variables import Value, Variables
from shards.dataset import Dataset
from shards.errors import nearest
from shards.schema import Schema


@dataclass(frozen=True)
class Records:
    """Latents and scalars of some subjects, in memory.

    Attributes:
        keys: of the records.
        rows: scalars by name.
        latents: by volume, (N, 1 or 2, C, h, w, d) float16: original and, if stored, mirrored; 0 where missing.
        there: by volume, which records have it, (N,) bool.
    """

    keys: list[str]
    rows: list[Mapping[str, Value]]
    latents: dict[str, Tensor]
    there: dict[str, Tensor]


def read_records(dataset: Dataset, keys: list[str], schema: Schema) -> Records:
    """All variables of ``schema`` for the records ``keys``.

    Raises:
        ConfigError: the dataset lacks a variable, or the schema lacks a record's category.
    """
    names, recorded = [v.name for v in schema], [v.name for v in dataset.index.schema]
    for name in names:
        if name not in recorded:
            raise ConfigError(f"schema: {nearest(name, recorded, 'variable of the data')}")
    rows: list[Mapping[str, Value]] = [scalar_values(dataset, key, schema, names) for key in keys]
    latents, there = {}, {}
    for volume in schema.volumes:
        has = [dataset.has(key, volume.name) for key in keys]
        mirrored = f"{volume.name}_mirrored"
        versions = [volume.name] + [mirrored] * any(dataset.has(key, mirrored) for key in keys)
        shape = dataset.index.arrays[volume.name]["shape"]
        stored = np.zeros((len(keys), len(versions), *shape), np.float16)
        for i, key in enumerate(keys):
            for j, version in enumerate(versions if has[i] else ()):
                stored[i, j] = dataset.read(key, version if dataset.has(key, version) else volume.name)
        latents[volume.name] = torch.from_numpy(stored)
        there[volume.name] = torch.tensor(has)
    return Records(keys, rows, latents, there)


class RecordTensors:
    """All values of some records, as tensors.

    Args:
        records: the records.
        variables: encodings of their scalars.

    Attributes:
        keys: of the records.
        values: by variable, (N, 1 or 2, C, h, w, d) float16 for a volume (original, mirrored), else (N, 1) or (N,).
        present: by variable, which records have a value, (N,) bool.
    """

    def __init__(self, records: Records, variables: Variables) -> None:
        self.keys = records.keys
        values, present = variables.encode_scalars(records.rows)
        self.values, self.present = values | records.latents, present | records.there

    def take(self, indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and presence of the records at ``indices``; by NumPy, see :func:`shards.order.prefetch`."""

        def pick(of_all: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(x.numpy()[indices]) for name, x in of_all.items()}

        return pick(self.values), pick(self.present)
