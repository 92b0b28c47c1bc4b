"""How much fine detail volumes have."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

PLANES = ("sagittal", "coronal", "axial")  # slices across the first, second and third axis
BRAIN = 0.1  # intensity


def sharpness(volume: NDArray[np.floating]) -> NDArray[np.float64]:
    """Energy of fine detail in the slices of each plane, (3,): the mean square, inside the brain, of what a Gaussian of
    one voxel removes.

    Args:
        volume: (H, W, D) in [0, 1]; without any brain its energy is 0.
    """
    inside = gaussian_filter(volume, 2) > BRAIN
    if not inside.any():
        return np.zeros(3)
    energies = []
    for axis in range(3):
        sigma = [0.0 if a == axis else 1.0 for a in range(3)]
        energies.append(float(np.square(volume - gaussian_filter(volume, sigma))[inside].mean()))
    return np.array(energies)
