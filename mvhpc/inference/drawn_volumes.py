"""Volumes to compare with real ones: drawn for the scalars of records, or read from a BIDS tree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvhpc.config import ConfigError
from mvhpc.inference.generate import decode
from mvhpc.inference.sampler import Sampler
from mvhpc.inference.scalar_draws import draw_scalars
from mvhpc.records import scalar_values
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Value
from shards.dataset import Dataset
from shards.nifti import read
from shards.schema import Schema, Variable
from shards.sheets import read_sheet, require_column

Floats = NDArray[np.float32]


def draw_for_records(
    sampler: Sampler, dataset: Dataset, keys: Sequence[str], volume: str, seed: int, batch: int
) -> Iterator[Floats]:
    """Draw a volume for the scalars of each record, with noise of its own.

    Scalars that a record lacks are drawn by the model of scalars where there is one, and otherwise left unknown.

    Args:
        sampler: of a joint model.
        dataset: packed, for the scalars.
        keys: of the records.
        volume: name of the volume.
        seed: of the noise; the volume of a record does not depend on the others.
        batch: volumes at a time.

    Yields:
        (H, W, D) float32 in [0, 1].
    """
    model = sampler.model
    names = [v.name for v in model.variables.scalars]
    for start in range(0, len(keys), batch):
        part = keys[start : start + batch]
        rows = [_complete(sampler, scalar_values(dataset, key, model.schema, names), seed, key) for key in part]
        given, present = model.variables.encode_scalars(rows)
        noise = [generator(seed, "drawings", key) for key in part]
        latents = sampler(given, noise, present, want=[volume])[volume]  # (B, C, h, w, d)
        for i in range(len(part)):
            yield decode(sampler, volume, latents[i : i + 1])


def _complete(sampler: Sampler, row: dict[str, Value], seed: int, key: str) -> dict[str, Value]:
    known = {name: value for name, value in row.items() if value is not None}
    if sampler.model.scalars is None or len(known) == len(row):
        return row
    return draw_scalars(sampler.model.scalars, known, [generator(seed, "scalars", key)])[0]


@dataclass(frozen=True)
class DrawnTree:
    """People of a BIDS tree such as `mvhpc generate` writes, on the grid of packed data.

    Attributes:
        names: of the people.
        values: scalars of each.
        files: of the volume of each.
        shape: that each has to have.
    """

    names: list[str]
    values: list[dict[str, Value]]
    files: list[Path]
    shape: tuple[int, ...]

    @classmethod
    def open(cls, tree: Path, schema: Schema, volume: Variable, shape: tuple[int, ...]) -> "DrawnTree":
        """Read the table of people, and find their volumes.

        Raises:
            ConfigError: somebody without a volume, or with several, or a cell that the schema does not take.
            DataError: no table, or one without a column of the schema.
        """
        table = tree / "participants.tsv"
        sheet = read_sheet(table)
        for variable in schema.scalars:
            require_column(sheet.columns, variable.column, table)
        names, values, files = [], [], []
        for line, cells in sheet.rows:
            name = cells["participant_id"]
            found = sorted((tree / name).glob(f"**/*_{volume.suffix}.nii.gz"))
            if len(found) != 1:
                raise ConfigError(f"{tree}: {name} has {len(found)} volumes *_{volume.suffix}.nii.gz; one is needed")
            try:
                values.append({v.name: v.parse(cells[v.column]) for v in schema.scalars})
            except ValueError as error:
                raise ConfigError(f"{table}, line {line}: {error}") from error
            names.append(name)
            files.append(found[0])
        return cls(names, values, files, shape)

    def take(self, places: Sequence[int]) -> "DrawnTree":
        """Some of the people, in the order of ``places``."""
        names, values, files = self.names, self.values, self.files
        return DrawnTree(
            [names[i] for i in places], [values[i] for i in places], [files[i] for i in places], self.shape
        )

    def __iter__(self) -> Iterator[Floats]:
        """Yields (H, W, D) float32 in [0, 1].

        Raises:
            ConfigError: another shape, or intensities beyond; the message names the file.
        """
        for file in self.files:
            voxels = read(file).voxels
            if voxels.shape != self.shape:
                raise ConfigError(
                    f"{file} has {voxels.shape} voxels, the data {self.shape}: draw with a model of these data"
                )
            if voxels.min() < -1e-3 or voxels.max() > 1 + 1e-3:
                raise ConfigError(
                    f"{file} has intensities from {voxels.min():.3g} to {voxels.max():.3g}; they have to lie "
                    "in [0, 1], as those of packed data"
                )
            yield np.clip(voxels, 0, 1)
