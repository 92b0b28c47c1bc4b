"""Linear registration to a template."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.nifti import read
from shards.preprocess.extraction import extracted_mask
from shards.preprocess.images import Volume, ants_library, resample, to_ants, working_grid
from shards.preprocess.recipe import Recipe

SPACING = 4.0  # mm, at which volumes are registered
KINDS = {"rigid": "Rigid", "affine": "Affine"}
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS and ITK's LPS


@dataclass(frozen=True)
class Template:
    """What scans are registered to.

    Attributes:
        brain: brain-extracted, on the grid of the results.
        mask: its brain, 0 or 1.
    """

    brain: Volume
    mask: Volume

    @property
    def centre(self) -> tuple[float, float, float]:
        """Of the brain's bounding box, at the nearest voxel, mm."""
        inside = np.argwhere(self.mask.voxels > 0)
        x, y, z, _ = self.mask.affine @ [*np.rint((inside.min(0) + inside.max(0)) / 2), 1]
        return float(x), float(y), float(z)


def register(brain: Volume, mask: Volume, template: Template, kind: str) -> NDArray[np.float64]:
    """Register a brain to the template: mutual information, from matching centres of mass.

    Args:
        brain: brain-extracted, background 0.
        mask: 0 or 1, on the same grid.
        template: to register to.
        kind: ``rigid`` or ``affine``.

    Returns:
        (4, 4), mm in the template's space (RAS) to mm in the scan's space.

    Raises:
        ValueError: the registration failed.
    """
    ants = ants_library()
    moving = resample(brain, *working_grid(mask, SPACING))
    fixed = resample(template.brain, *working_grid(template.mask, SPACING))
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = ants.registration(to_ants(fixed), to_ants(moving), KINDS[kind], outprefix=f"{folder}/")
        except (RuntimeError, ValueError) as error:
            raise ValueError("the registration failed") from error
        return _matrix(ants.read_transform(found["fwdtransforms"][0]))


def _matrix(transform: Any) -> NDArray[np.float64]:
    """(4, 4) in RAS of ITK's affine transform y = A (x - c) + c + t."""
    linear = np.asarray(transform.parameters[:9]).reshape(3, 3)
    centre = np.asarray(transform.fixed_parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = np.asarray(transform.parameters[9:]) + centre - linear @ centre
    return FLIP @ matrix @ FLIP


def transform_bytes(matrix: NDArray[np.float64]) -> bytes:
    """A map as the content of an ITK transform file (``.mat``), which ANTs, ITK-SNAP and 3D Slicer read."""
    ants = ants_library()
    itk = FLIP @ matrix @ FLIP
    transform = ants.create_ants_transform(
        transform_type="AffineTransform", matrix=itk[:3, :3], translation=itk[:3, 3], precision="double"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transform.mat"
        ants.write_transform(transform, str(path))
        return path.read_bytes()


def load_template(file: Path | None, recipe: Recipe) -> Template:
    """The template on the grid of the results.

    Args:
        file: a brain-extracted volume; None for the MNI152 template that nilearn brings.
        recipe: names the space and the spacing.

    Raises:
        DataError: a file that cannot be used.
    """
    if file is None:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

        image, brain_mask = load_mni152_template(resolution=1), load_mni152_brain_mask(resolution=1)
        source = Volume(np.ascontiguousarray(image.get_fdata(dtype=np.float32)), image.affine)
        mask = source.like(brain_mask.get_fdata(dtype=np.float32) > 0.5)
    else:
        try:
            scan = read(file)
        except ValueError as error:
            raise DataError(f"{file}: {error}") from error
        source = Volume(scan.voxels, scan.affine)
        found = extracted_mask(source)
        if found is None:
            raise DataError(f"{file}: a template has to be brain-extracted, with an empty background")
        mask = found
    source = source.like(source.voxels * mask.voxels)
    steps = np.linalg.norm(source.affine[:3, :3], axis=0)
    size = [int(np.ceil(n * step / recipe.spacing)) for n, step in zip(source.voxels.shape, steps)]
    affine = source.affine @ np.diag([*(recipe.spacing / steps), 1.0])
    brain, inside = (resample(v, affine, (size[0], size[1], size[2])) for v in (source, mask))
    return Template(brain, inside.like(inside.voxels > 0.5))
