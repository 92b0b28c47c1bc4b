"""The box that volumes are packed in: which layers of the grid a brain fills, and the smallest box that holds all."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGE = 1e-3  # share of a brain's signal; less on one side of a layer is stray voxels
MULTIPLE = 8  # of the sides: the autoencoders of all presets halve a side three times at most
SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


def extent(
    signal: NDArray[np.float32], step: NDArray[np.floating[Any]], centre: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    """The layers of the grid between which a brain lies, but for :data:`EDGE` of its signal on each side.

    Args:
        signal: (X, Y, Z), background 0.
        step: (3, 3), voxels of the signal per step along each axis of the grid, in columns.
        centre: (3,), voxel of the signal at the grid's centre.

    Returns:
        (3, 2), first and last layer of each axis of the grid, counted from its centre.
    """
    inside = np.nonzero(signal)
    weights = signal[inside].astype(np.float64)
    offsets = np.linalg.inv(step) @ (np.stack(inside) - np.asarray(centre)[:, None])  # (3, voxels)
    layers = np.rint(offsets).astype(np.int64)
    bounds = []
    for axis in layers:
        share = np.cumsum(np.bincount(axis - axis.min(), weights)) / weights.sum()
        first, last = np.searchsorted(share, (EDGE, 1 - EDGE), side="right")
        bounds.append((axis.min() + first, axis.min() + min(last, len(share) - 1)))
    return np.array(bounds)


def smallest_shape(extents: Iterable[NDArray[np.int64]]) -> tuple[int, int, int]:
    """The smallest box whose sides are multiples of :data:`MULTIPLE` and that holds all extents off its edge."""
    lows, highs = zip(*(bounds.T for bounds in extents))
    half = np.maximum(1 - np.min(lows, 0), 2 + np.max(highs, 0))  # voxel n // 2 is the centre, one layer stays free
    height, width, depth = (int(n) for n in -(-2 * half // MULTIPLE) * MULTIPLE)
    return height, width, depth


def touched(bounds: NDArray[np.int64], shape: tuple[int, int, int]) -> list[str]:
    """The sides of a box whose outermost layer a brain reaches.

    Args:
        bounds: of the brain, see :func:`extent`.
        shape: of the box.
    """
    found = []
    for (low, high), n, (start, end) in zip(bounds, shape, SIDES):
        found += [start] * bool(low <= -(n // 2)) + [end] * bool(high >= n - n // 2 - 1)
    return found
