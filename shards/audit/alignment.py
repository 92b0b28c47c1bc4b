"""Affine alignment of a volume to the mean brain, in milliseconds, so that pose and size do not hide likeness.

The inverse compositional algorithm (Baker and Matthews, 2004): the gradients are those of the mean brain, so each step
is one interpolation and one product with a matrix that is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.linalg import fractional_matrix_power, polar
from scipy.spatial.transform import Rotation

LEVELS_MM = (2.0, 4.0, 8.0)  # sizes of voxels: of details, of the last step, of the first ones
STEPS = (0, 1, 12)  # at these sizes
Array = NDArray[np.float32]
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Affine:
    """A point of the mean brain -> a point of a volume, both in mm from the centre of the grid.

    Attributes:
        matrix: (3, 3).
        shift: (3,), mm.
    """

    matrix: NDArray[np.float64]
    shift: NDArray[np.float64]

    @property
    def degrees(self) -> float:
        """The angle by which it turns."""
        return float(np.degrees(Rotation.from_matrix(polar(self.matrix)[0]).magnitude()))


def factors(spacing: float) -> list[int]:
    """Of each level, how many voxels of the level before (of the volume, for the first one) make one of its voxels.

    Args:
        spacing: of the volume, mm.
    """
    found = []
    for size in LEVELS_MM:
        found.append(max(1, round(size / spacing)))
        spacing *= found[-1]
    return found


def pyramid(volume: NDArray[np.floating], spacing: float) -> list[Array]:
    """A volume at each level, as means over blocks; edges that fill no block are filled with 0 on both sides."""
    levels: list[Array] = []
    current = np.asarray(volume, np.float32)
    for factor in factors(spacing):
        current = _block_means(current, factor)
        levels.append(current)
    return levels


def _block_means(volume: Array, factor: int) -> Array:
    if factor == 1:
        return volume
    extra = [-n % factor for n in volume.shape]
    padded = np.pad(volume, [(n // 2, n - n // 2) for n in extra]) if any(extra) else volume
    blocks = [part for n in padded.shape for part in (n // factor, factor)]
    return np.asarray(padded.reshape(blocks).mean((1, 3, 5)), np.float32)


class Aligner:
    """Aligns volumes to a mean brain.

    Args:
        mean: the mean brain at each level, see :func:`pyramid`.
        spacing: of the volumes, mm.
    """

    def __init__(self, mean: Sequence[Array], spacing: float) -> None:
        self.mean = list(mean)
        self.sizes = [spacing * float(product) for product in np.cumprod(factors(spacing))]  # mm
        self._solvers = [_solver(level, size) if steps else None for level, size, steps in zip(mean, self.sizes, STEPS)]

    def fit(self, levels: Sequence[Array]) -> Affine:
        """The affine transformation that makes a volume most like the mean brain.

        Args:
            levels: of the volume, see :func:`pyramid`.
        """
        best = Affine(np.eye(3), np.zeros(3))
        for level in reversed(range(len(levels))):
            solver = self._solvers[level]
            if solver is not None and levels[level].any():
                best = self._descend(levels[level], level, solver, best)
        return best

    def _descend(self, volume: Array, level: int, solver: Array, start: Affine) -> Affine:
        """Steps at one level, as long as the difference falls."""
        mean = self.mean[level]
        scaled = volume * (mean.mean() / volume.mean())
        best, least, current = start, np.inf, start
        for step in range(STEPS[level] + 1):
            residual = (self.warp(scaled, level, current) - mean).ravel()
            difference = float(np.square(residual).sum())
            if difference >= least:
                break
            best, least = current, difference
            if step < STEPS[level]:
                update = np.einsum("pv,v->p", solver, residual).astype(np.float64)  # BLAS depends on its threads
                change = np.eye(3) + update[3:12].reshape(3, 3)
                if np.linalg.det(change) < 0.1:  # no brain is that unlike another one
                    break
                matrix = current.matrix @ np.linalg.inv(change)
                current = Affine(matrix, current.shift - matrix @ update[:3])
        return best

    def warp(self, volume: Array, level: int, affine: Affine, box: Box | None = None) -> Array:
        """A volume of a level where ``affine`` moves it to the mean brain; ``box`` is the part to compute."""
        box = box or tuple(slice(0, n) for n in volume.shape)
        centre = (np.array(volume.shape) - 1) / 2
        first, shape = np.array([s.start for s in box]), tuple(s.stop - s.start for s in box)
        offset = centre + affine.shift / self.sizes[level] + affine.matrix @ (first - centre)
        return np.asarray(ndimage.affine_transform(volume, affine.matrix, offset, shape, order=1), np.float32)


def centred(mean: Sequence[Array], spacing: float) -> list[Array]:
    """A mean brain, moved so that its mirrored copy lies where it does itself.

    Without that, all brains that are aligned to it differ from their mirrored copies in the same way.

    Args:
        mean: at each level.
        spacing: of the volumes, mm.
    """
    aligner = Aligner(mean, spacing)
    fit = aligner.fit([level[::-1] for level in mean])
    between = np.eye(4)
    between[:3, :3], between[:3, 3] = fit.matrix, fit.shift
    half = np.real(fractional_matrix_power(between, -0.5))
    move = Affine(half[:3, :3], half[:3, 3])
    return [aligner.warp(level, n, move) for n, level in enumerate(mean)]


def _solver(mean: Array, size: float) -> Array:
    """(13, voxels), which gives the step from a difference: 3 mm, 9 of the matrix, and the change of brightness."""
    gradient = np.stack(np.gradient(mean)) / size
    where = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * size for n in mean.shape], indexing="ij"))
    products = (gradient[:, None] * where).reshape(9, -1)
    columns = np.concatenate([gradient.reshape(3, -1), products, mean.reshape(1, -1)])
    lengths = np.linalg.norm(columns, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return np.asarray(np.linalg.pinv((columns / lengths).T) / lengths, np.float32)
