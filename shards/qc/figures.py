"""Figures of one volume, from its voxels and affine alone, that tell a brain-extracted T1w scan from other images.

All figures are ratios, millimetres or millilitres, so neither the scale of the intensities nor the order of the axes
in the file matters. Shape is measured on block means of about 3 mm. What the figures mean, and where their limits
lie, is in :mod:`shards.qc.limits`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shards.qc.orientation import upright

COARSE = 3.0  # mm, of the voxels on which shape is measured
LEVEL = 0.2  # of the bright tissue, above which a voxel belongs to the outline; CSF of T1w lies about there
CLEAR = 9.0  # mm from the outline, beyond which an extracted brain has no signal
FAINT = 0.01  # of bright tissue; less is what interpolation or a network leaves in an empty background
INSIDE = 8.0  # mm below the surface, where no scalp, skull or rim of a mask is
BULK, BEYOND = (5, 95), 5  # percentiles of tissue; how many times their range lies below and above what tissue can have
FEW = 30  # voxels; medians and percentiles of fewer are not taken
HOUNSFIELD = -900.0  # a background below is air in Hounsfield units; magnitudes of MR are not negative
RAYS, RAY_STEP, RAY_DEPTH = 800, 1.5, 30.0  # rays into the upper half of the outline; mm
Array = NDArray[np.floating[Any]]


def background(voxels: NDArray[np.float32]) -> float:
    """The most frequent value on the volume's faces.

    It is what brain extraction wrote outside of the brain, whatever that is (0, -1024, 0 among negative values).
    """
    values, counts = np.unique(_faces(voxels), return_counts=True)
    return float(values[counts.argmax()])


def tissue_bounds(values: NDArray[np.float32]) -> tuple[float, float]:
    """The values within which tissue lies; beyond are dead pixels, spikes and overflows.

    Args:
        values: of the foreground, not empty.
    """
    low, high = (float(p) for p in np.percentile(values, BULK))
    reach = BEYOND * (high - low)
    return (low - reach, high + reach) if reach else (-np.inf, np.inf)


def measure(voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> dict[str, float]:
    """The figures of a volume.

    Args:
        voxels: (X, Y, Z), finite, axes nearest to right, anterior, superior.
        affine: (4, 4), voxel to mm.

    Returns:
        Figure -> value, rounded to four digits. Figures that a volume does not have (the layers of an object thinner
        than they are) are left out; a constant volume has the first two alone. Names are the keys of
        :data:`shards.qc.limits.LIMITS`.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    empty = background(voxels)
    figures = {
        "voxel_mm": float(zooms.max()),
        "hounsfield": float((np.abs(voxels + 1000) < 100).mean()) if empty < HOUNSFIELD else 0.0,
    }
    signal = voxels - np.float32(empty)
    strength = np.abs(signal)
    if strength.any():
        most = np.float32(tissue_bounds(strength[strength > 0])[1])
        signal, strength = np.clip(signal, -most, most), np.minimum(strength, most)
        bright = float(np.percentile(strength[strength > 0], 99))
        foreground = strength > FAINT * bright
        figures["empty_faces"] = 1 - float(_faces(foreground).mean())
        figures["negative"] = float((voxels < min(empty, 0.0) - 0.02 * bright).sum() / foreground.sum())
        figures["flat"] = _flat(voxels, foreground)
        figures |= _shape(signal / np.float32(bright), foreground, zooms)
    return {name: float(f"{value:.4g}") for name, value in figures.items() if np.isfinite(value)}


def _faces(voxels: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.take(voxels, (0, -1), axis).ravel() for axis in range(3)])


def _flat(voxels: NDArray[np.float32], foreground: NDArray[np.bool_]) -> float:
    """Share of neighbours in the foreground that are exactly equal, along the axis where they are fewest."""
    shares = []
    for axis in range(3):
        one, next_one = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
        both = foreground[one] & foreground[next_one]
        equal = (voxels[one] == voxels[next_one]) & both
        shares.append(float(equal.sum()) / max(int(both.sum()), 1))
    return min(shares)


def _around(foreground: NDArray[np.bool_], margin: Sequence[int]) -> tuple[slice, ...]:
    """The smallest box with the foreground and ``margin`` voxels around it."""
    box = []
    for axis, (n, extra) in enumerate(zip(foreground.shape, margin)):
        filled = np.flatnonzero(foreground.any(tuple({0, 1, 2} - {axis})))
        box.append(slice(max(0, filled[0] - extra), min(n, filled[-1] + extra + 1)))
    return tuple(box)


def _block_means(volume: NDArray[np.float32], factors: Sequence[int]) -> NDArray[np.float32]:
    """Means over blocks of ``factors`` voxels; the last block repeats the edge where it is not full."""
    means: Array = np.pad(volume, [(0, -n % f) for n, f in zip(volume.shape, factors)], mode="edge")
    for axis, factor in enumerate(factors):
        if factor > 1:
            means = np.add.reduceat(means, range(0, means.shape[axis], factor), axis=axis) / factor
    return means.astype(np.float32, copy=False)


def _shape(signal: NDArray[np.float32], foreground: NDArray[np.bool_], zooms: NDArray[np.float64]) -> dict[str, float]:
    """Figures of the outline: the largest bright object, holes filled."""
    factors = [max(1, round(COARSE / z)) for z in zooms]
    size = zooms * factors
    box = _around(foreground, factors)
    signal = signal[box]
    coarse = np.maximum(_block_means(signal, factors), 0)
    bright = coarse > 0.05 * coarse.max()
    if not bright.any():
        return {}
    tissue = float(np.percentile(coarse[bright], 90))
    above = coarse > LEVEL * tissue
    labels, _ = ndimage.label(ndimage.binary_fill_holes(above))
    outline = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    lengths, cuts = [], []
    for axis in range(3):
        area = outline.sum(tuple({0, 1, 2} - {axis}))
        lengths.append(float((area > 0).sum() * size[axis]))
        cuts += [float(area[end] / area.max()) for end in (0, -1)]
    volume = float(outline.sum() * size.prod())  # mm^3
    figures = {
        "volume_ml": volume / 1000,
        "width_mm": lengths[0],
        "length_mm": lengths[1],
        "height_mm": lengths[2],
        "cut": max(cuts),
        "compact": volume / float(np.prod(lengths)),
        "solid": float((above & outline).sum() / outline.sum()),
    }
    beyond = ndimage.distance_transform_edt(~outline, sampling=size) > CLEAR + size.max()
    samples = np.abs(signal[tuple(slice(f // 2, None, f) for f in factors)]) > FAINT * tissue  # one in each full block
    inside_box = beyond[tuple(slice(n) for n in samples.shape)]
    blocks = foreground.size / float(np.prod(factors))  # of the whole volume; outside of the box all is background
    space = int(inside_box.sum()) + max(0.0, blocks - samples.size)
    figures["signal_outside"] = float(samples[inside_box].sum()) / space if space else 0.0
    figures |= _contrast(coarse, outline, size, tissue)
    figures["gap"] = _gap(coarse, outline, size, tissue)
    figures["upright"], figures["likeness"] = upright(outline, size)
    return figures


def _contrast(coarse: Array, outline: NDArray[np.bool_], size: Array, tissue: float) -> dict[str, float]:
    """Figures of the intensities by their depth below the surface of the outline."""
    depth = ndimage.distance_transform_edt(np.pad(outline, 1), sampling=size)[1:-1, 1:-1, 1:-1]
    slope = np.sqrt(sum(np.square(s) for s in np.gradient(np.pad(coarse, 1, mode="edge"), *size)))[1:-1, 1:-1, 1:-1]
    at_surface, inside = ndimage.binary_dilation(outline), depth > INSIDE
    figures = {}
    for name, region in (("blur", at_surface), ("blur_inside", inside)):
        steepest = float(np.percentile(slope[region], 98)) if np.count_nonzero(region) >= FEW else 0.0
        if steepest:
            figures[name] = tissue / steepest / float(size.max())
    outer, inner = coarse[outline & (depth > 3) & (depth <= 9)], coarse[(depth > 12) & (depth <= 21)]
    if min(outer.size, inner.size) >= FEW and np.median(inner) > 0:
        low, middle, high = np.percentile(coarse[inside], (2, 50, 98))
        if middle > low:
            rim = float(np.median(outer) / np.median(inner))
            figures |= {"rim": rim, "fluid": rim * float((high - middle) / (middle - low))}
    return figures


def _gap(coarse: Array, outline: NDArray[np.bool_], size: Array, tissue: float) -> float:
    """Share of rays from the surface of the upper half inward that cross a dark gap between two bright layers.

    The gap is the skull, between scalp and brain: bone gives no signal. A ray counts where, within 30 mm, the signal
    falls below half of a brighter layer before it, and rises above twice that again.
    """
    points = np.argwhere(outline) * size
    centre = points.mean(0)
    n = np.arange(RAYS) + 0.5
    height = n / RAYS  # of a unit half sphere: the Fibonacci lattice
    turn = np.pi * (1 + 5**0.5) * n
    ring = np.sqrt(1 - height**2)
    directions = np.stack([ring * np.cos(turn), ring * np.sin(turn), height])  # (3, RAYS)
    reach = np.arange(0, float(np.linalg.norm(points - centre, axis=1).max()) + 2 * RAY_STEP, RAY_STEP)
    where = (centre[:, None, None] + directions[:, :, None] * reach) / size[:, None, None]
    inside = ndimage.map_coordinates(outline.astype(np.float32), where, order=1) > 0.5
    last = inside.shape[1] - 1 - inside[:, ::-1].argmax(1)  # of each ray: its outermost sample within the outline
    values = ndimage.map_coordinates(coarse, where, order=1) / tissue
    steps = last[:, None] - np.arange(int(RAY_DEPTH / RAY_STEP))
    inward = np.take_along_axis(values, np.maximum(steps, 0), 1)  # (RAYS, steps), from the surface
    before = np.maximum.accumulate(inward, 1)
    after = np.maximum.accumulate(inward[:, ::-1], 1)[:, ::-1]
    dark = (inward < 0.5 * before) & (inward < 0.5 * after) & (after > 0.35) & (before > 0.35)
    return float(dark.any(1).mean())
