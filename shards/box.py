"""The box that volumes are packed in: which layers of the grid a brain fills, and the smallest box that holds all."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT = 1e-6  # layers; less is rounding of the affine
EDGE = 1e-3  # share of a brain's signal; less on one side of a layer is stray voxels
MULTIPLE = 8  # of the sides: the autoencoders of all presets halve a side three times at most
SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


class Profile:
    """The signal of a brain, summed over the layers of each axis.

    Args:
        signal: (x, y, z), background 0; a part of a volume that holds all of it.
        corner: (3,), the first voxel of the part in the volume.
    """

    def __init__(self, signal: NDArray[np.float32], corner: tuple[int, ...] = (0, 0, 0)) -> None:
        self.signal, self.corner = signal, np.asarray(corner)
        rows = signal.sum(2, dtype=np.float64)
        self._sums = rows.sum(1), rows.sum(0), signal.sum((0, 1), dtype=np.float64)
        self.total = float(self._sums[0].sum())

    def centre(self) -> NDArray[np.float64]:
        """(3,), the centre of mass, voxels of the volume."""
        return self.corner + np.array([float(sums @ np.arange(len(sums))) for sums in self._sums]) / self.total

    def extent(self, step: NDArray[np.floating[Any]], centre: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The layers of a grid between which the brain lies, but for :data:`EDGE` of its signal on each side.

        Args:
            step: (3, 3), voxels per step along each axis of the grid, in columns.
            centre: (3,), voxel of the volume at the grid's centre.

        Returns:
            (3, 2), first and last layer of each axis of the grid, counted from its centre.
        """
        shift = np.asarray(centre) - self.corner
        return np.array([self._bounds(row, shift) for row in np.linalg.inv(step)])

    def _bounds(self, row: NDArray[np.floating[Any]], shift: NDArray[np.floating[Any]]) -> tuple[int, int]:
        """First and last layer along one axis of the grid, of which ``row`` are the layers per voxel."""
        offsets = [r * (np.arange(n) - c) for r, n, c in zip(row, self.signal.shape, shift)]
        along = int(np.abs(row).argmax())
        across = sum(np.abs(o).max() for axis, o in enumerate(offsets) if axis != along)
        if across < EXACT:
            layers, weights = np.rint(offsets[along]).astype(np.int64), self._sums[along]
        else:
            inside, (x, y, z) = self.signal > 0, np.ix_(*offsets)
            layers = np.rint((x + y + z)[inside]).astype(np.int64)
            weights = self.signal[inside]
        least = int(layers.min())
        share = np.cumsum(np.bincount(layers - least, weights)) / self.total
        first, last = np.searchsorted(share, (EDGE, 1 - EDGE), side="right")
        return least + int(first), least + int(min(last, len(share) - 1))


def smallest_shape(extents: Iterable[NDArray[np.int64]]) -> tuple[int, int, int]:
    """The smallest box whose sides are multiples of :data:`MULTIPLE` and that holds all extents off its edge."""
    lows, highs = zip(*(bounds.T for bounds in extents))
    half = np.maximum(1 - np.min(lows, 0), 2 + np.max(highs, 0))  # voxel n // 2 is the centre, one layer stays free
    height, width, depth = (int(n) for n in -(-2 * half // MULTIPLE) * MULTIPLE)
    return height, width, depth


def touched(bounds: NDArray[np.int64], shape: tuple[int, int, int]) -> list[str]:
    """The sides of a box whose outermost layer a brain reaches.

    Args:
        bounds: of the brain, see :meth:`Profile.extent`.
        shape: of the box.
    """
    found = []
    for (low, high), n, (start, end) in zip(bounds, shape, SIDES):
        found += [start] * bool(low <= -(n // 2)) + [end] * bool(high >= n - n // 2 - 1)
    return found
