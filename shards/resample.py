"""Linear resampling of a volume to a grid, without aliasing."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FWHM_TO_SIGMA = 1 / math.sqrt(8 * math.log(2))
TRUNCATE = 4.0  # standard deviations, where the Gaussian ends
EXACT = 1e-6  # voxels; a smaller shift is rounding of the affine


def sample(
    voxels: NDArray[np.float32],
    step: NDArray[np.floating[Any]],
    offset: NDArray[np.floating[Any]],
    shape: tuple[int, int, int],
    beyond: str = "grid-constant",
) -> NDArray[np.float32]:
    """Sample a volume linearly at ``step @ index + offset``, without aliasing.

    For a coarser target the volume is smoothed first, with the Gaussian by which the point spread functions of the two
    voxel sizes differ (Cardoso et al., MICCAI 2015).

    Where the axes of both grids are parallel, each is sampled for itself, and voxels at whole positions are copied.

    Args:
        voxels: (X, Y, Z).
        step: (3, 3), voxels per step along each target axis, in columns.
        offset: (3,), voxel at target index 0.
        shape: of the result.
        beyond: SciPy's mode outside the volume: ``grid-constant`` for zeros, ``nearest`` for its edge. (``constant``
            would set the outermost voxels to zero where rounding moves them out of the volume.)

    Returns:
        float32 of ``shape``.
    """
    if beyond == "grid-constant":
        whole = (0, 0, 0), voxels.shape
        return sample_part(voxels, *whole, step, offset, shape)
    smooth = ndimage.gaussian_filter(voxels, _sigmas(step), mode=beyond, truncate=TRUNCATE)
    return ndimage.affine_transform(smooth, step, offset, output_shape=shape, order=1, mode=beyond)


def sample_part(
    part: NDArray[np.float32],
    corner: tuple[int, ...],
    size: tuple[int, ...],
    step: NDArray[np.floating[Any]],
    offset: NDArray[np.floating[Any]],
    shape: tuple[int, int, int],
) -> NDArray[np.float32]:
    """:func:`sample` of a volume that is 0 outside of a part; only what the part reaches is computed.

    Args:
        part: (x, y, z).
        corner: (3,), the first voxel of the part in the volume.
        size: (3,), of the volume.
        step, offset, shape: see :func:`sample`.
    """
    sigmas = _sigmas(step)
    reach = [int(TRUNCATE * sigma + 0.5) for sigma in sigmas]
    lows = [min(c, r) for c, r in zip(corner, reach)]  # the Gaussian spreads the part within the volume
    highs = [min(n - c - m, r) for n, c, m, r in zip(size, corner, part.shape, reach)]
    if any(lows) or any(highs):
        part = np.pad(part, list(zip(lows, highs)))
    shift = np.asarray(offset, np.float64) - (np.asarray(corner) - lows)
    result = np.zeros(shape, np.float32)
    box, start = _reached(np.asarray(part.shape), step, shift, shape)
    if any(s.start >= s.stop for s in box):
        return result
    inner = tuple(s.stop - s.start for s in box)
    off_axis = np.abs(step - np.diag(np.diag(step))) @ np.asarray(shape)
    if off_axis.max() < EXACT:
        result[box] = _sample_axes(part, np.diag(step), start, inner, sigmas)
    else:
        if any(sigmas > 0):
            part = ndimage.gaussian_filter(part, sigmas, mode="grid-constant", truncate=TRUNCATE)
        result[box] = ndimage.affine_transform(part, step, start, output_shape=inner, order=1, mode="grid-constant")
    return result


def _sigmas(step: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(3,), of the Gaussian along the volume's axes, voxels."""
    coarser = np.maximum(np.linalg.norm(step, axis=1) ** 2 - 1, 0)
    sigmas: NDArray[np.float64] = np.sqrt(np.where(coarser > EXACT, coarser, 0)) * FWHM_TO_SIGMA
    return sigmas


def _reached(
    size: NDArray[np.int64], step: NDArray[np.floating[Any]], offset: NDArray[np.float64], shape: tuple[int, int, int]
) -> tuple[tuple[slice, ...], NDArray[np.float64]]:
    """The box of the target that a volume of ``size`` reaches, and the volume's voxel at its first index."""
    corners = np.stack(np.meshgrid(*[(-1.0, float(n)) for n in size], indexing="ij")).reshape(3, -1)
    targets = np.linalg.solve(step, corners - offset[:, None])  # (3, 8)
    lows = np.maximum(np.floor(targets.min(1)), 0).astype(int)
    highs = np.minimum(np.ceil(targets.max(1)) + 1, shape).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(lows, highs)), step @ lows + offset


def _sample_axes(
    part: NDArray[np.float32],
    steps: NDArray[np.floating[Any]],
    offset: NDArray[np.float64],
    shape: tuple[int, ...],
    sigmas: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Smooth and sample a volume along each of its axes."""
    values: NDArray[Any] = part
    fractional = []
    for axis, (step, start, n, sigma) in enumerate(zip(steps, offset, shape, sigmas)):
        if sigma > 0:
            values = ndimage.gaussian_filter1d(values, sigma, axis, mode="grid-constant", truncate=TRUNCATE)
        positions = start + step * np.arange(n)
        whole = np.rint(positions)
        if np.abs(positions - whole).max() < EXACT:
            values = _take(values, axis, whole.astype(int))
        else:
            fractional.append((axis, positions))
    for axis, positions in sorted(fractional, key=lambda item: len(item[1]) / values.shape[item[0]]):
        values = _interpolate(values, axis, positions)
    return values.astype(np.float32, copy=False)


def _take(values: NDArray[Any], axis: int, where: NDArray[np.int64]) -> NDArray[Any]:
    """The layers at some positions; zeros outside."""
    n = values.shape[axis]
    inside = (where >= 0) & (where < n)
    strides = set(np.diff(where).tolist())
    if inside.all() and len(strides) == 1 and (stride := strides.pop()) > 0:
        return values[(slice(None),) * axis + (slice(int(where[0]), int(where[-1]) + 1, stride),)]
    taken = np.take(values, np.clip(where, 0, n - 1), axis)
    taken[(slice(None),) * axis + (~inside,)] = 0
    return taken


def _interpolate(values: NDArray[Any], axis: int, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation along one axis in double precision."""
    first = np.floor(positions)
    share = (positions - first).reshape([-1 if a == axis else 1 for a in range(3)])
    wide = values.astype(np.float64, copy=False)
    low, high = _take(wide, axis, first.astype(int)), _take(wide, axis, first.astype(int) + 1)
    return low * (1 - share) + high * share
