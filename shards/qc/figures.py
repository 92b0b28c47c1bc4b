"""Figures of one volume, from its voxels and affine alone, that tell a brain-extracted T1w scan from other images.

All figures are ratios, millimetres or millilitres, so neither the scale of the intensities nor the order of the axes
in the file matters. Those of shape are in :mod:`shards.qc.outline`. What the figures mean, and where their limits lie,
is in :mod:`shards.qc.limits`.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shards.foreground import Foreground, bounds_of, foreground
from shards.qc.outline import FAINT, shape_figures

HOUNSFIELD = -900.0  # a background below is air in Hounsfield units; magnitudes of MR are not negative
BRIGHT = np.float32(99) / np.float32(100)  # quantile of bright tissue
WHITE, TOP = 0.75, 0.995  # quantiles of the foreground: white matter, and what becomes 1


def measure(voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> dict[str, float]:
    """The figures of a volume.

    Args:
        voxels: (X, Y, Z), finite, axes nearest to right, anterior, superior.
        affine: (4, 4), voxel to mm.

    Returns:
        Figure -> value, rounded to four digits. Figures that a volume does not have (the layers of an object thinner
        than they are) are left out; a constant volume has the first two alone. Names are the keys of
        :data:`shards.qc.limits.LIMITS`.
    """
    return measure_foreground(foreground(voxels), affine)


def measure_foreground(found: Foreground, affine: NDArray[np.float64]) -> dict[str, float]:
    """:func:`measure` of a volume whose foreground is known."""
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    voxels, empty, size = found.voxels, found.empty, math.prod(found.shape)
    figures = {"voxel_mm": float(zooms.max()), "hounsfield": 0.0}
    if empty < HOUNSFIELD:
        air = np.count_nonzero(np.abs(voxels + 1000) < 100) + (size - voxels.size) * (abs(empty + 1000) < 100)
        figures["hounsfield"] = air / size
    if len(found.strengths):
        most = np.float32(bounds_of(found.strengths)[1])
        bright = float(min(found.strengths.quantile(BRIGHT), most))
        start, stop = found.strengths.below(FAINT * bright), found.strengths.below(float(most), inclusive=True)
        figures["outliers"] = 1 - stop / len(found.strengths)
        white, top = (float(found.strengths.quantile(np.float64(q), start, stop)) for q in (WHITE, TOP))
        figures["peak"] = top / white
        signal, strength = found.signal, found.strength
        if figures["outliers"]:
            signal = np.clip(signal, -most, most)
        inside = strength > np.float32(FAINT * bright)
        count = int(np.count_nonzero(inside))
        outer = np.abs(found.faces - np.float32(empty)) > np.float32(FAINT * bright)
        figures["empty_faces"] = 1 - float(outer.mean())
        figures["negative"] = np.count_nonzero(voxels < min(empty, 0.0) - 0.02 * bright) / count
        figures["flat"] = _flat(voxels, inside)
        figures |= shape_figures(signal / np.float32(bright), inside, found, zooms)
    return {name: float(f"{value:.4g}") for name, value in figures.items() if np.isfinite(value)}


def _flat(voxels: NDArray[np.float32], foreground: NDArray[np.bool_]) -> float:
    """Share of neighbours in the foreground that are exactly equal, along the axis where they are fewest."""
    shares = []
    for axis in range(3):
        one, next_one = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
        both = foreground[one] & foreground[next_one]
        equal = (voxels[one] == voxels[next_one]) & both
        shares.append(float(equal.sum()) / max(int(both.sum()), 1))
    return min(shares)
