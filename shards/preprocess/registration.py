"""Linear registration to a template."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.preprocess.images import Volume, ants_library, resample, to_ants, working_grid

SPACING = 4.0  # mm, at which volumes are registered
KINDS = {"rigid": "Rigid", "affine": "Affine"}
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS and ITK's LPS


@dataclass(frozen=True)
class Template:
    """What scans are registered to.

    Attributes:
        brain: brain-extracted, on the grid of the results.
        mask: its brain, 0 or 1.
        space: label of the space in BIDS names.
    """

    brain: Volume
    mask: Volume
    space: str


@dataclass(frozen=True)
class Registration:
    """A linear map found by registration.

    Attributes:
        matrix: (4, 4), mm in the template's space (RAS) to mm in the scan's space.
        correlation: of the resampled scan and the template inside the template's brain.
        overlap: Dice coefficient of the two brain masks in the template's space.
    """

    matrix: NDArray[np.float64]
    correlation: float
    overlap: float


def register(brain: Volume, mask: Volume, template: Template, kind: str) -> Registration:
    """Register a brain to the template: mutual information, from matching centres of mass.

    Args:
        brain: brain-extracted, background 0.
        mask: 0 or 1, on the same grid.
        template: to register to.
        kind: ``rigid`` or ``affine``.

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
        matrix = _matrix(ants.read_transform(found["fwdtransforms"][0]))
    warped = resample(moving, fixed.affine, fixed.voxels.shape, matrix).voxels  # type: ignore[arg-type]
    theirs = resample(mask, fixed.affine, fixed.voxels.shape, matrix).voxels > 0.5  # type: ignore[arg-type]
    ours = resample(template.mask, fixed.affine, fixed.voxels.shape).voxels > 0.5  # type: ignore[arg-type]
    overlap = 2 * float((theirs & ours).sum()) / max(1, int(theirs.sum() + ours.sum()))
    correlation = float(np.corrcoef(warped[ours], fixed.voxels[ours])[0, 1]) if warped[ours].std() > 0 else 0.0
    return Registration(matrix, correlation, overlap)


def _matrix(transform: Any) -> NDArray[np.float64]:
    """(4, 4) in RAS of ITK's affine transform y = A (x - c) + c + t."""
    linear = np.asarray(transform.parameters[:9]).reshape(3, 3)
    centre = np.asarray(transform.fixed_parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = np.asarray(transform.parameters[9:]) + centre - linear @ centre
    return FLIP @ matrix @ FLIP


def write_transform(matrix: NDArray[np.float64], path: Path) -> None:
    """Write a map as an ITK transform file (``.mat``) that ANTs, ITK-SNAP and 3D Slicer read."""
    ants = ants_library()
    itk = FLIP @ matrix @ FLIP
    transform = ants.create_ants_transform(
        transform_type="AffineTransform", matrix=itk[:3, :3], translation=itk[:3, 3], precision="double"
    )
    ants.write_transform(transform, str(path))


def load_template(file: Path | None, spacing: float) -> Template:
    """The template on a grid of the given spacing.

    Args:
        file: a brain-extracted volume; None for the MNI152 template that nilearn brings.
        spacing: mm.
    """
    from shards.volumes import read

    if file is None:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

        image, brain_mask = load_mni152_template(resolution=1), load_mni152_brain_mask(resolution=1)
        source = Volume(np.ascontiguousarray(image.get_fdata(dtype=np.float32)), image.affine)
        mask = source.like(brain_mask.get_fdata(dtype=np.float32) > 0.5)
        source = source.like(source.voxels * mask.voxels)
        space = "MNI152NLin2009aSym"
    else:
        scan = read(file)
        source = Volume(scan.voxels, scan.affine)
        mask = source.like(source.voxels > 0)
        space = "".join(c for c in file.name.partition(".")[0] if c.isalnum()) or "template"
    steps = np.linalg.norm(source.affine[:3, :3], axis=0)
    size = [int(np.ceil(n * step / spacing)) for n, step in zip(source.voxels.shape, steps)]
    affine = source.affine @ np.diag([*(spacing / steps), 1.0])
    shape = (size[0], size[1], size[2])
    brain, inside = resample(source, affine, shape), resample(mask, affine, shape)
    return Template(brain, inside.like(inside.voxels > 0.5), space)
