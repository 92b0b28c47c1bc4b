"""Figures of the outline of a brain or head: size, shape, what lies beyond it, and contrast by depth below it.

They are measured on block means of about 3 mm.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shards.foreground import Foreground
from shards.qc.orientation import upright

COARSE = 3.0  # mm, of the voxels on which shape is measured
LEVEL = 0.2  # of the bright tissue, above which a voxel belongs to the outline; CSF of T1w lies about there
CLEAR = 9.0  # mm from the outline, beyond which an extracted brain has no signal
FAINT = 0.01  # of bright tissue; less is what interpolation or a network leaves in an empty background
INSIDE = 8.0  # mm below the surface, where no scalp, skull or rim of a mask is
FEW = 30  # voxels; medians and percentiles of fewer are not taken
RAYS, RAY_STEP, RAY_DEPTH = 800, 1.5, 30.0  # rays into the upper half of the outline; mm
Array = NDArray[np.floating[Any]]


def shape_figures(
    signal: NDArray[np.float32], inside: NDArray[np.bool_], found: Foreground, zooms: NDArray[np.float64]
) -> dict[str, float]:
    """Figures of the outline: the largest bright object, holes filled.

    Args:
        signal: (x, y, z), bright tissue 1, background 0; of the foreground.
        inside: (x, y, z), where there is signal.
        found: the foreground.
        zooms: (3,), mm, of a voxel.
    """
    factors = [max(1, round(COARSE / z)) for z in zooms]
    size = zooms * factors
    signal = _with_margin(signal, inside, found, factors)
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
    beyond = ~_within(outline, CLEAR + size.max(), size)
    samples = np.abs(signal[tuple(slice(f // 2, None, f) for f in factors)]) > FAINT * tissue  # one in each full block
    inside_box = beyond[tuple(slice(n) for n in samples.shape)]
    blocks = math.prod(found.shape) / float(np.prod(factors))  # outside of the box all is background
    space = int(inside_box.sum()) + max(0.0, blocks - samples.size)
    figures["signal_outside"] = float(samples[inside_box].sum()) / space if space else 0.0
    figures |= _contrast(coarse, outline, size, tissue)
    figures["gap"] = _gap(coarse, outline, size, tissue)
    figures["upright"], figures["likeness"] = upright(outline, size)
    return figures


def _with_margin(
    signal: NDArray[np.float32], inside: NDArray[np.bool_], found: Foreground, margin: Sequence[int]
) -> NDArray[np.float32]:
    """The smallest box of the volume with all signal and ``margin`` voxels around it."""
    box, pads = [], []
    for axis, (n, start, extra) in enumerate(zip(found.shape, found.corner, margin)):
        filled = np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) + start
        low, high = max(0, filled[0] - extra), min(n, filled[-1] + extra + 1)
        end = start + signal.shape[axis]
        box.append(slice(max(low - start, 0), min(high, end) - start))
        pads.append((max(start - low, 0), max(high - end, 0)))
    return np.pad(signal[tuple(box)], pads)


def _block_means(volume: NDArray[np.float32], factors: Sequence[int]) -> NDArray[np.float32]:
    """Means over blocks of ``factors`` voxels; the last block repeats the edge where it is not full."""
    means: Array = np.pad(volume, [(0, -n % f) for n, f in zip(volume.shape, factors)], mode="edge")
    for axis, factor in enumerate(factors):
        if factor > 1:
            layers = [means[(slice(None),) * axis + (slice(start, None, factor),)] for start in range(factor)]
            total = layers[0] + layers[1]
            for layer in layers[2:]:
                total += layer
            means = total / factor
    return means.astype(np.float32, copy=False)


def _within(mask: NDArray[np.bool_], distance: float, size: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Voxels at most ``distance`` mm from a mask: its dilation by a ball, one shift for each of the ball's columns."""
    reach = [int(distance / s) for s in size]
    padded = np.pad(mask, [(r, r) for r in reach])
    columns = [padded[:, :, reach[2] : -reach[2] or None]]  # columns[k]: mask within k voxels along the last axis
    for k in range(1, reach[2] + 1):
        shifted = (padded[:, :, reach[2] + s : padded.shape[2] - reach[2] + s] for s in (-k, k))
        columns.append(columns[-1] | next(shifted) | next(shifted))
    found = np.zeros(mask.shape, bool)
    x, y, _ = mask.shape
    for i in range(2 * reach[0] + 1):
        for j in range(2 * reach[1] + 1):
            steps = np.array([i - reach[0], j - reach[1], 0])
            fits = [
                k for k in range(reach[2] + 1) if np.sqrt(np.square(np.add(steps, (0, 0, k)) * size).sum()) <= distance
            ]
            if fits:
                found |= columns[fits[-1]][i : i + x, j : j + y]
    return found


def _contrast(coarse: Array, outline: NDArray[np.bool_], size: Array, tissue: float) -> dict[str, float]:
    """Figures of the intensities by their depth below the surface of the outline."""
    depth = _depth(outline, size)
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


def _depth(outline: NDArray[np.bool_], size: Array) -> Array:
    """mm, from each voxel of an outline to the next one outside of it or of the volume; 0 outside."""
    box = ndimage.find_objects(outline.astype(np.int8))[0]
    depth = np.zeros(outline.shape)
    depth[box] = ndimage.distance_transform_edt(np.pad(outline[box], 1), sampling=size)[1:-1, 1:-1, 1:-1]
    return depth


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
    steps = np.maximum(last[:, None] - np.arange(int(RAY_DEPTH / RAY_STEP)), 0)  # (RAYS, steps), inward
    along = np.take_along_axis(where, np.broadcast_to(steps, (3, *steps.shape)), 2)
    inward = ndimage.map_coordinates(coarse, along, order=1) / tissue
    before = np.maximum.accumulate(inward, 1)
    after = np.maximum.accumulate(inward[:, ::-1], 1)[:, ::-1]
    dark = (inward < 0.5 * before) & (inward < 0.5 * after) & (after > 0.35) & (before > 0.35)
    return float(dark.any(1).mean())
