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


def upright(outline: NDArray[np.bool_], size: NDArray[np.float64]) -> tuple[float, float]:
    """Likeness of an outline to a brain's, as it is stored and beyond that of its best other orientation.

    The outline is scaled to the reference's volume and centred on it; likeness is the correlation of both, smoothed.
    Left and right are taken as equal, because a brain's outline does not tell them apart.

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
    likeness = {name: float((ours * other).sum()) / norm for name, other in _orientations()}
    as_stored = likeness.pop(((0, 1, 2), (1, 1)))
    return as_stored - max(likeness.values()), as_stored


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
def _orientations() -> list[tuple[tuple[tuple[int, ...], tuple[int, ...]], NDArray[np.float32]]]:
    """The reference with its axes exchanged and reversed, smoothed, of mean 0 and norm 1.

    The name of each is the order of its axes and the directions of the two that are not left-right.
    """
    smooth = ndimage.gaussian_filter(_reference(), SMOOTH / spacing(SHAPE))
    smooth -= smooth.mean()
    smooth /= np.sqrt(np.square(smooth).sum())
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=2):
            turned = smooth[:, :: signs[0], :: signs[1]].transpose(order)
            found.append(((order, signs), np.ascontiguousarray(turned)))
    return found
