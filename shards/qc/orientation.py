"""Which way up a brain is stored, by the likeness of its outline to that of an average procedural brain."""

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shards.phantom.anatomy import LAW
from shards.phantom.brain import render_tissues, spacing

SHAPE = (32, 32, 32)
SMOOTH = 5.0  # mm, SD: coarser than gyri
TILTS = (-24, -12, 0, 12, 24)  # degrees about the left-right axis: heads lie in a scanner with the chin up or down
AS_STORED = ((0, 1, 2), (1, 1))


def upright(outline: NDArray[np.bool_], size: NDArray[np.float64]) -> tuple[float, float]:
    """Likeness of an outline to a brain's, as it is stored and beyond that of its best other orientation.

    The outline is scaled to the reference's volume and centred on it; likeness is the correlation of both, smoothed,
    at the best tilt of the head (within 24 degrees). Left and right are taken as equal, because a brain's outline
    does not tell them apart.

    Args:
        outline: (X, Y, Z), axes towards right, anterior, superior.
        size: (3,), mm, of a voxel.

    Returns:
        Likeness as stored less the largest of the 23 other orientations with axes exchanged or reversed (negative
        where another one fits better), and the likeness as stored, at most 1.
    """
    step = spacing(SHAPE)
    points = np.argwhere(outline)
    volume = len(points) * float(size.prod())
    scale = (volume / _reference_volume()) ** (1 / 3)
    ours = ndimage.gaussian_filter(outline.astype(np.float32), SMOOTH * scale / size)
    matrix = np.diag(step * scale / size)
    middle = np.array([(n - 1) / 2 for n in SHAPE])
    offset = points.mean(0) - matrix @ middle
    ours = ndimage.affine_transform(ours, matrix, offset, SHAPE, order=1)
    ours = ours - ours.mean()
    norm = float(np.sqrt(np.square(ours).sum()))
    names, references = _orientations()
    likeness = (references @ ours.ravel() / norm).reshape(-1, len(TILTS)).max(1)
    as_stored = float(likeness[names.index(AS_STORED)])
    others = [value for name, value in zip(names, likeness) if name != AS_STORED]
    return as_stored - float(max(others)), as_stored


@lru_cache(maxsize=1)
def _reference() -> NDArray[np.float32]:
    """The outline of an average brain: share of each voxel inside, symmetric, its centre of mass in the middle."""
    anatomy = {name: float(r.mean(50, 0.5)) for name, r in LAW.items()}
    anatomy |= {name: float(np.exp(anatomy[name])) for name, r in LAW.items() if r.log}
    tissues = render_tissues(anatomy, np.random.default_rng(0), SHAPE)
    inside = tissues.csf + tissues.grey + tissues.white
    middle = [(n - 1) / 2 for n in SHAPE]
    moved = ndimage.shift(inside, np.subtract(middle, ndimage.center_of_mass(inside)), order=1)
    return np.asarray((moved + moved[::-1]) / 2, np.float32)


def _reference_volume() -> float:
    """mm^3."""
    return float(_reference().sum()) * spacing(SHAPE) ** 3


@lru_cache(maxsize=1)
def _orientations() -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], NDArray[np.float32]]:
    """The smoothed reference in 24 orientations, with every tilt of each.

    Returns:
        Names of the orientations: the order of the axes, and the directions of the two that are not left-right; and
        (orientations x tilts, voxels), each row of mean 0 and norm 1.
    """
    smooth = ndimage.gaussian_filter(_reference(), SMOOTH / spacing(SHAPE))
    tilted = [ndimage.rotate(smooth, tilt, axes=(1, 2), reshape=False, order=1) for tilt in TILTS]
    names = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=2)))
    rows = np.stack([t[:, :: signs[0], :: signs[1]].transpose(order).ravel() for order, signs in names for t in tilted])
    rows -= rows.mean(1, keepdims=True)
    return names, rows / np.linalg.norm(rows, axis=1, keepdims=True)
