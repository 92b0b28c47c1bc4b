"""Where volumes that a model draws lie, and their BIDS names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvhpc.models.training_people import TrainingPeople
from shards.index import Record
from shards.schema import Schema

GRID = "the grid of the model, 0 mm at the brain's centre of mass: where scans lie is not recorded"


@dataclass(frozen=True)
class Place:
    """Where a volume on the model's grid lies.

    Attributes:
        affine: (4, 4), voxel to mm.
        space: BIDS label of the space; empty for a scanner's own, which BIDS leaves out, or an unknown one.
        reference: what the position is of, in words, for the sidecar.
        known: whether it is the position of scans or of a template.
    """

    affine: NDArray[np.float64]
    space: str
    reference: str
    known: bool = True

    def name(self, key: str, suffix: str) -> str:
        """The BIDS name of a drawn volume, without ending; an empty ``key`` leaves out the subject."""
        parts = [key, f"space-{self.space}" if self.space else "", "desc-synthetic", suffix]
        return "_".join(part for part in parts if part)


def place_of_record(grid: Mapping[str, Any], schema: Schema, record: Record, volumes: Sequence[str]) -> Place:
    """Where a volume drawn for a record lies: as the first of ``volumes`` whose place is recorded."""
    if "space" in grid:
        return _in_template(grid)
    for name in volumes:
        if name in record.affines:
            suffix = schema[name].suffix
            return Place(np.array(record.affines[name]), suffix, f"the participant's {suffix} scan")
    return Place(np.array(grid["affine"]), "", GRID, known=False)


def place_of_training(grid: Mapping[str, Any], training: TrainingPeople, name: str) -> Place:
    """Where a volume of a drawn person lies: in the template's space, or at the training scans' median place."""
    if "space" in grid:
        return _in_template(grid)
    origin = training.variables.get(name, {}).get("origin")
    affine = np.array(grid["affine"], float)
    if origin is None:
        return Place(affine, "", GRID, known=False)
    affine[:3, 3] = origin
    return Place(affine, "", "the median position of the training's scans in their scanners")


def _in_template(grid: Mapping[str, Any]) -> Place:
    return Place(np.array(grid["affine"]), grid["space"], f"the template {grid['space']}")


def nifti(voxels: NDArray, affine: ArrayLike) -> nib.Nifti1Image:
    """A volume (H, W, D) in [0, 1] as NIfTI: 16-bit integers scaled by 1/32767, affine as qform and sform."""
    image = nib.Nifti1Image(np.round(np.clip(voxels, 0, 1) * 32767).astype(np.int16), np.asarray(affine, float))
    image.header.set_slope_inter(1 / 32767, 0)
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, code="aligned")
    image.set_sform(image.affine, code="aligned")
    return image
