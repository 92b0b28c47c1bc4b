"""What a NIfTI header says of the voxels' sizes and directions, and where it contradicts itself.

The rule: the sform counts where its code is not 0, then the qform, as in nibabel and most programs. A scan is rejected
where qform and sform disagree on the voxel sizes, on left and right, or, in one space, on which axis is which: one of
the two is wrong, and only the owner of the scan knows which. It is flagged where they are turned against each other,
where pixdim alone disagrees, and where neither has a code, so that the header does not tell left from right. Axes that
are far from right angles are wrong too: no scanner has such axes.
"""

from typing import Any

import numpy as np
from nibabel.affines import from_matvec
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

MILLIMETRES = {1: 1e3, 3: 1e-3}  # NIfTI's codes for metres and micrometres; other codes are read as millimetres
CONTRADICTION = 0.1  # relative difference of voxel sizes; below lie rounding and calibration


def millimetres(image: Any) -> float:
    """mm in the header's unit of length."""
    return MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)


def affine_mm(image: Any) -> NDArray[np.float64]:
    """(4, 4), voxel to mm, for any unit of the header."""
    unit = millimetres(image)
    return np.diag([unit, unit, unit, 1.0]) @ image.affine


def compare_forms(image: Any) -> dict[str, float]:
    """Compare sform, qform and pixdim of a NIfTI image.

    Returns:
        Figures of quality control: ``header_degrees``, the angle between qform and sform; ``header_sizes``, by how much
        pixdim differs from the voxel sizes that count; ``unoriented``, 1 where neither form has a code, else 0.

    Raises:
        ValueError: they contradict each other, or pixdim is not finite; the message gives the reason without the path.
    """
    header = image.header
    sizes = np.linalg.norm(affine_mm(image)[:3, :3], axis=0)
    pixdim = np.abs(np.array(header.get_zooms()[:3], np.float64)) * millimetres(image)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    differ = float(np.max(np.abs(pixdim / sizes - 1)))
    if not np.isfinite(differ):
        raise ValueError("the header's pixdim is infinite or NaN: correct it")
    figures = {"header_degrees": 0.0, "header_sizes": differ, "unoriented": float(sform < 1 and qform < 1)}
    if sform < 1 or qform < 1:
        return figures
    if differ > CONTRADICTION:
        ours, theirs = (" x ".join(f"{z:.3g}" for z in each) for each in (sizes, pixdim))
        raise ValueError(
            f"the header contradicts itself: voxels are {ours} mm by its sform, {theirs} mm by its pixdim and qform; "
            "correct the one that is wrong"
        )
    try:
        turns = [_rotation(header.get_sform()), _rotation(header.get_qform())]
    except (ValueError, HeaderDataError):
        raise ValueError("the header's qform is damaged: set its code to 0, or correct it") from None
    if np.linalg.det(turns[0]) * np.linalg.det(turns[1]) < 0:
        raise ValueError("the header contradicts itself: left and right are exchanged between its sform and its qform")
    angle = np.degrees(np.arccos(np.clip((np.trace(turns[0].T @ turns[1]) - 1) / 2, -1, 1)))
    codes = ["".join(aff2axcodes(from_matvec(turn))) for turn in turns]
    if sform == qform and codes[0] != codes[1] and angle > 45:
        raise ValueError(
            f"the header contradicts itself: its axes point to {codes[0]} by the sform and to {codes[1]} by the qform"
        )
    return figures | {"header_degrees": float(angle)}


def shear_degrees(affine: NDArray[np.float64]) -> float:
    """By how much the angles between the axes of an affine, (4, 4), differ from 90 degrees; the largest."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(np.triu(directions.T @ directions, 1)).max()
    return float(np.degrees(np.arcsin(min(1.0, cosines))))


def _rotation(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3), the orthogonal matrix nearest to the directions of an affine's axes."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(directions)
    turn: NDArray[np.float64] = u @ v
    return turn
