"""Probabilities of cerebrospinal fluid, grey matter and white matter."""

import numpy as np

from shards.preprocess.images import Volume
from shards.preprocess.recipe import TISSUES

COMPONENTS = ("CSF", "CSF", "GM", "WM")  # dark to bright in a T1-weighted scan; voxels of fluid and cortex are fluid
START = (3, 15, 45, 85)  # percentiles of the intensities at which the means of the components start
RANGE = (0.5, 99.5)  # percentiles; brighter voxels are vessels
FIT_VOXELS = 30_000


def tissue_maps(brain: Volume, mask: Volume) -> dict[str, Volume]:
    """The posterior probability of each tissue, from a mixture of normals on the intensities.

    Fluid has two components: most of its voxels outside of the ventricles are shared with the cortex.

    Args:
        brain: bias-corrected.
        mask: 0 or 1, on the same grid.

    Returns:
        Tissue -> map in [0, 1], 0 outside the mask; the three sum to 1 inside.

    Raises:
        ValueError: too few different intensities in the mask.
    """
    from sklearn.mixture import GaussianMixture

    inside = mask.voxels > 0
    values = brain.voxels[inside].astype(np.float64)
    chosen = np.random.default_rng(0).choice(values, min(FIT_VOXELS, values.size), replace=False)
    chosen = np.clip(chosen, *np.percentile(values, RANGE))[:, None]
    start = np.percentile(chosen, START)
    if np.unique(start).size < len(START):
        raise ValueError("too few different intensities to tell tissues apart")
    mixture = GaussianMixture(len(START), means_init=start[:, None], random_state=0).fit(chosen)
    order = np.argsort(mixture.means_[:, 0])
    mean, variance = mixture.means_[order, 0, None], mixture.covariances_[order, 0]  # (4, 1)
    clipped = np.clip(values, mean[0], mean[-1])  # what is darker is fluid, what is brighter white matter
    logits = np.log(mixture.weights_[order, None]) - 0.5 * (np.log(variance) + (clipped - mean) ** 2 / variance)
    posterior = np.exp(logits - logits.max(0))  # (4, voxels)
    posterior /= posterior.sum(0)
    maps = {}
    for name in TISSUES:
        voxels = np.zeros(brain.voxels.shape, np.float32)
        voxels[inside] = sum(p for component, p in zip(COMPONENTS, posterior) if component == name)
        maps[name] = brain.like(voxels)
    return maps
