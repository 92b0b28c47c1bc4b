"""The scans that pages of predictions show."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from shards.nifti import read
from shards.participant_rows import Row as Visit
from shards.preprocess.derivative import result_files
from shards.preprocess.recipe import MNI, Recipe
from shards.preprocess.registration import load_template

EDGE = 0.1  # of a packed volume; below lies what resampling leaves around the brain
Array = NDArray[np.float32]


class ScanPictures:
    """The scans of the pages: of the derivative, otherwise of the packed data.

    Attributes:
        template: the template's brain on the grid of the derivative; None without registration to the built-in one.
    """

    def __init__(self, source: Path, recipe: Recipe | None) -> None:
        self.source, self.recipe = source, recipe
        registered = recipe is not None and "registration" in recipe.steps and recipe.template == MNI
        self.template = load_template(None, recipe).mask.voxels if registered and recipe else None

    def read(self, predictor: ScalarsPredictor, key: str) -> tuple[Array, Array]:
        """A scan in [0, 1], and its brain mask; (X, Y, Z), RAS."""
        if self.recipe is None:
            packed = predictor.dataset.read(key, predictor.model.variables.volumes[0].name).astype(np.float32)
            return packed, (packed > EDGE).astype(np.float32)
        suffix = predictor.schema.volumes[0].suffix
        visit = Visit(0, key, subject_of(key), "", "", {}, {})
        files = result_files(self.source, visit, suffix, self.recipe)
        voxels, mask = (read(files[name]).voxels for name in ("image", "mask"))
        return np.clip(voxels / np.percentile(voxels[mask > 0], 99.5), 0, 1), mask
