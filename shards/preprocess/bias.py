"""Correction of the scanner's intensity inhomogeneity: N4 (Tustison et al., IEEE TMI 2010)."""

import numpy as np

from shards.preprocess.images import Volume, ants_library, resample, to_ants, working_grid

SPACING = 3.0  # mm; the field is smooth, and is estimated on a coarse volume
SHRINK = 2
ITERATIONS = (20, 20, 20, 20)
TOLERANCE = 1e-6


def correct_bias(brain: Volume, mask: Volume) -> Volume:
    """Divide a volume by the smooth multiplicative field that N4 estimates inside the mask.

    The field has mean 1 inside the mask; outside, voxels are set to 0.

    Args:
        brain: at least 0 inside the mask.
        mask: 0 or 1, on the same grid.

    Raises:
        ValueError: N4 finds no usable field.
    """
    ants = ants_library()
    affine, shape = working_grid(mask, SPACING)
    share = resample(mask, affine, shape).voxels
    inside = share > 0.5
    signal = resample(brain.like(brain.voxels * mask.voxels), affine, shape).voxels
    coarse = np.where(inside, signal / np.maximum(share, 0.5), 0)
    field = ants.n4_bias_field_correction(
        to_ants(Volume(coarse.astype(np.float32), affine)),
        to_ants(Volume(inside.astype(np.float32), affine)),
        shrink_factor=SHRINK,
        convergence={"iters": list(ITERATIONS), "tol": TOLERANCE},
        return_bias_field=True,
    ).numpy()
    if not (np.isfinite(field).all() and (field[inside] > 0).all()):
        raise ValueError("N4 found no usable bias field")
    field = np.maximum(field / field[inside].mean(dtype=np.float64), 0.05).astype(np.float32)
    fine = resample(Volume(field, affine), brain.affine, brain.voxels.shape, beyond="nearest").voxels
    return brain.like(np.where(mask.voxels > 0, brain.voxels / fine, 0))
