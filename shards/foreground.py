"""The part of a volume that is not background, and where it lies."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.percentiles import Ordered

BULK, BEYOND = (5, 95), 5  # percentiles of tissue; how many times their range lies below and above what tissue can have


@dataclass(frozen=True)
class Foreground:
    """A volume without the layers at its borders that hold background alone.

    Attributes:
        voxels: float32 (x, y, z), contiguous; everything beyond is background.
        corner: (3,), the first voxel in the whole volume.
        shape: of the whole volume, (X, Y, Z).
        empty: the value of the background.
        faces: the values on the six faces of the whole volume.
    """

    voxels: NDArray[np.float32]
    corner: tuple[int, int, int]
    shape: tuple[int, int, int]
    empty: float
    faces: NDArray[np.float32]

    @cached_property
    def strength(self) -> NDArray[np.float32]:
        """(x, y, z), the distance from the background."""
        return np.abs(self.signal)

    @cached_property
    def signal(self) -> NDArray[np.float32]:
        """(x, y, z), the difference from the background."""
        return self.voxels - np.float32(self.empty) if self.empty else self.voxels

    @cached_property
    def strengths(self) -> Ordered:
        """The order statistics of the strength where it is not 0."""
        return Ordered(self.strength[self.strength > 0])


def cut(voxels: NDArray[Any], empty: Any) -> tuple[slice, slice, slice]:
    """The smallest box with all voxels that differ from ``empty``; one voxel where there are none."""
    filled = voxels != empty
    last = filled.any(2)
    axes = (last.any(1), last.any(0), filled.any((0, 1)) if filled.flags.c_contiguous else filled.any(0).any(0))
    found = [np.flatnonzero(layers) for layers in axes]
    if not len(found[0]):
        return slice(1), slice(1), slice(1)
    x, y, z = (slice(int(layers[0]), int(layers[-1]) + 1) for layers in found)
    return x, y, z


def faces(voxels: NDArray[Any]) -> NDArray[Any]:
    """The values on the six faces of a volume, (n,)."""
    ends = [(slice(None),) * axis + (end,) for axis in range(3) for end in (0, -1)]
    return np.concatenate([voxels[end].ravel() for end in ends])


def most_frequent(values: NDArray[Any]) -> float:
    """The most frequent of some values, the least of several."""
    if values[0] == values[-1] and (values == values[0]).all():
        return float(values[0])
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


def background(voxels: NDArray[np.float32]) -> float:
    """The most frequent value on the volume's faces.

    It is what brain extraction wrote outside of the brain, whatever that is (0, -1024, 0 among negative values).
    """
    return most_frequent(faces(voxels))


def foreground(voxels: NDArray[np.float32]) -> Foreground:
    """The foreground of a whole volume.

    Args:
        voxels: (X, Y, Z), finite.
    """
    outer = faces(voxels)
    empty = most_frequent(outer)
    box = cut(voxels, np.float32(empty))
    return place_foreground(np.ascontiguousarray(voxels[box]), box, voxels.shape, empty, outer)


def place_foreground(
    voxels: NDArray[np.float32],
    box: tuple[slice, ...],
    shape: tuple[int, ...],
    empty: float,
    outer: NDArray[np.float32],
) -> Foreground:
    """The foreground of which ``voxels`` are the ``box`` of a volume of ``shape`` with the faces ``outer``."""
    (i, j, k), (x, y, z) = (s.start or 0 for s in box), shape
    return Foreground(voxels, (i, j, k), (x, y, z), empty, outer)


def tissue_bounds(values: NDArray[np.float32]) -> tuple[float, float]:
    """The values within which tissue lies; beyond are dead pixels, spikes and overflows.

    Args:
        values: of the foreground, not empty.
    """
    return bounds_of(Ordered(values.ravel()))


def bounds_of(values: Ordered, start: int = 0) -> tuple[float, float]:
    """:func:`tissue_bounds` of the values from a rank on."""
    low, high = (float(values.quantile(np.float64(p) / 100, start)) for p in BULK)
    reach = BEYOND * (high - low)
    return (low - reach, high + reach) if reach else (-np.inf, np.inf)
