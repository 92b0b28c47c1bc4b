"""Figures of a scan that is registered to a template: whether the registration and the brain extraction succeeded."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def compare(
    image: NDArray[np.floating[Any]],
    mask: NDArray[np.bool_],
    template: NDArray[np.floating[Any]],
    template_mask: NDArray[np.bool_],
    registration: str,
) -> dict[str, float]:
    """Overlap and likeness of a scan and the template, on the template's grid.

    Args:
        image: (X, Y, Z), the scan's intensities; any scale.
        mask: (X, Y, Z), its brain.
        template: (X, Y, Z), intensities of the same contrast.
        template_mask: (X, Y, Z), its brain.
        registration: ``affine`` or ``rigid``; after a rigid one, size and shape of the head differ from the template's.

    Returns:
        ``R_covered``: share of the template's brain inside of the mask; ``R_overlap``: Dice of the masks;
        ``R_similarity``: correlation of the intensities where both are brain, each clipped to its percentiles 1 to 99,
        0 without contrast; R is the registration. For :func:`shards.qc.limits.verdict`.

    Raises:
        ValueError: arrays of different shapes, or a template without brain.
    """
    shapes = {a.shape for a in (image, mask, template, template_mask)}
    if len(shapes) > 1:
        raise ValueError(f"image, template and masks have different shapes: {sorted(shapes)}")
    if not template_mask.any():
        raise ValueError("the template's mask is empty")
    both = mask & template_mask
    common, theirs = int(both.sum()), int(template_mask.sum())
    similarity = 0.0
    if common > 1:
        a, b = (np.clip(x, *np.percentile(x, (1, 99))) for x in (image[both], template[both]))
        if a.std() and b.std():
            similarity = float(np.corrcoef(a, b)[0, 1])
    figures = {
        "covered": common / theirs,
        "overlap": 2 * common / (int(mask.sum()) + theirs),
        "similarity": similarity,
    }
    return {f"{registration}_{name}": float(f"{value:.4g}") for name, value in figures.items()}
