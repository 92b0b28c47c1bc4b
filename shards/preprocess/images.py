"""Volumes with their affine, and their conversion to images of ANTs."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.resample import sample

SEED = 1  # of ANTs' random sampling
MARGIN = 20.0  # mm around the foreground of a working volume


@dataclass(frozen=True)
class Volume:
    """A volume in some space.

    Attributes:
        voxels: float32 (X, Y, Z).
        affine: (4, 4), voxel to mm, axes towards right, anterior, superior in any rotation.
    """

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in ml."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def like(self, voxels: NDArray[Any]) -> "Volume":
        """Other voxels on the same grid."""
        return Volume(np.ascontiguousarray(voxels, dtype=np.float32), self.affine)


def ants_library() -> Any:
    """The module ``ants``, with one thread and a fixed seed, so that equal input gives equal bits."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # read once, when the library is loaded
    import ants

    ants.config.set_ants_deterministic(True, SEED)
    return ants


def to_ants(volume: Volume) -> Any:
    """An ANTs image of a volume whose grid is not rotated; ITK's axes point to the left and to the back."""
    spacing = np.diag(volume.affine)[:3]
    origin = volume.affine[:3, 3] * [-1, -1, 1]
    return ants_library().from_numpy(volume.voxels, tuple(origin), tuple(spacing), np.diag([-1.0, -1.0, 1.0]))


def resample(
    volume: Volume,
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    transform: NDArray[np.float64] | None = None,
    beyond: str = "grid-constant",
) -> Volume:
    """Sample a volume on another grid, linearly and without aliasing.

    Args:
        volume: to sample.
        affine: (4, 4) of the target grid, voxel to mm.
        shape: of the target grid.
        transform: (4, 4), mm in the target's space to mm in the volume's space; None where these are one space.
        beyond: outside of the volume, see :func:`shards.resample.sample`.
    """
    to_voxel = np.linalg.inv(volume.affine) @ (np.eye(4) if transform is None else transform) @ affine
    voxels = sample(volume.voxels, to_voxel[:3, :3], to_voxel[:3, 3], shape, beyond)
    return Volume(voxels, affine)


def working_grid(mask: Volume, spacing: float) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """An unrotated isotropic grid around the mask.

    Args:
        mask: non-zero inside.
        spacing: mm.

    Returns:
        Affine (4, 4) and shape.
    """
    inside = np.argwhere(mask.voxels > 0)
    low, high = inside.min(0), inside.max(0)
    corners = np.array([[x, y, z, 1] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    millimetres = (mask.affine @ corners.T)[:3]
    start, end = millimetres.min(1) - MARGIN, millimetres.max(1) + MARGIN
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = start
    n = np.ceil((end - start) / spacing).astype(int) + 1
    return affine, (int(n[0]), int(n[1]), int(n[2]))
