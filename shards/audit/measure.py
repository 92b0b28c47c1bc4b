"""What the audit keeps of one volume: measures, histogram, a sketch of its details, and a picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from shards.audit.alignment import Affine, Aligner, Array, pyramid

BINS = 64  # of intensities, in [0, 1]
FAINT = 0.02  # of the intensities; the background is 0
MASK = 0.3  # of the mean brain's maximum; details are compared above
MARGIN = 3  # voxels around the mean brain that its smooth copy needs
SKETCH = 8192  # numbers
QUALITY = 55  # of the pictures, of 100
DETAILS, MIDDLE = 0, 1  # levels of shards.audit.alignment

MEASURES = {  # name -> meaning
    "mean_likeness": "correlation with the mean brain, after affine alignment",
    "left_right": "likeness of its left-right differences to those of the mean brain; below 0: it may be mirrored",
    "up_down": "likeness to the mean brain, less that of the volume turned upside down; below 0: it may be upside down",
    "symmetry": "correlation with itself mirrored",
    "turned_degrees": "rotation against the mean brain",
    "brightness": "mean intensity of the brain",
    "contrast": "standard deviation of the brain's intensities, as a share of their mean",
    "detail": "strength of the details, as a share of the mean intensity: noise raises it, blur lowers it",
    "histogram": "mean distance of the intensities from the median histogram",
}


@dataclass(frozen=True)
class Reference:
    """The mean brain of a volume variable.

    Attributes:
        aligner: to the mean brain.
        members: key -> alignment of each of the brains that it is the mean of.
        spacing: mm.
    """

    aligner: Aligner
    members: Mapping[str, Affine]
    spacing: float


@dataclass(frozen=True)
class Measured:
    """What is kept of one volume.

    Attributes:
        values: of :data:`MEASURES`, without the histogram's.
        histogram: (BINS,), shares of the brain's voxels.
        sketch: float16 (SKETCH,), of its details; the product of two sketches estimates that of the details.
        picture: three slices side by side, uint8 (rows, columns).
    """

    values: dict[str, float]
    histogram: NDArray[np.float64]
    sketch: NDArray[np.float16]
    picture: NDArray[np.uint8]


def measure(volume: Array, key: str, reference: Reference, height: int) -> Measured:
    """Measure one volume.

    Args:
        volume: float32 (H, W, D) in [0, 1], RAS.
        key: of its record.
        reference: of its variable.
        height: of the picture, pixels.
    """
    aligner = reference.aligner
    levels = pyramid(volume, reference.spacing)
    affine = reference.members.get(key) or aligner.fit(levels)
    stored, aligned, mean = levels[MIDDLE], aligner.warp(levels[MIDDLE], MIDDLE, affine), aligner.mean[MIDDLE]
    if key in reference.members and len(reference.members) > 1:  # a brain is not compared with itself
        count = np.float32(len(reference.members))
        mean = (mean * count - aligned) / (count - np.float32(1))
    brain = volume[volume > FAINT]
    counts = np.histogram(brain, BINS, (0, 1))[0]
    brightness = float(brain.mean()) if brain.size else 0.0
    values = {
        "mean_likeness": correlation(aligned, mean),
        "left_right": correlation(aligned - aligned[::-1], mean - mean[::-1]),
        "up_down": correlation(stored, mean) - correlation(stored[:, :, ::-1], mean),
        "symmetry": correlation(aligned, aligned[::-1]),
        "turned_degrees": affine.degrees,
        "brightness": brightness,
        "contrast": float(brain.std() / brightness) if brightness else 0.0,
    }
    aligned_details = details(levels[DETAILS], affine, aligner)
    if brightness:
        values["detail"] = float(aligned_details.std()) / brightness
    shares = counts / max(1, counts.sum())
    return Measured(values, shares, sketch(aligned_details), picture(volume, height))


def correlation(a: Array, b: Array) -> float:
    """Of the voxels; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def details(volume: Array, affine: Affine, aligner: Aligner) -> Array:
    """What a smooth copy of an aligned brain lacks, inside the mean brain, (voxels,)."""
    mean = aligner.mean[DETAILS]
    inside = mean > MASK * mean.max()
    around = [np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(
        slice(max(0, filled[0] - MARGIN), min(n, filled[-1] + 1 + MARGIN)) for filled, n in zip(around, mean.shape)
    )
    aligned = aligner.warp(volume, DETAILS, affine, box)
    return (aligned - ndimage.gaussian_filter(aligned, 1.0, truncate=MARGIN))[inside[box]]


def sketch(details: Array) -> NDArray[np.float16]:
    """A count sketch (Charikar et al., 2002).

    Each voxel is added to one of few numbers, with a random sign: products of sketches are those of the details on
    average, with an error of 1 / sqrt(SKETCH) for details of norm 1.
    """
    norm = float(np.sqrt(np.square(details).sum()))
    if not norm:
        return np.zeros(SKETCH, np.float16)
    draw = np.random.default_rng(0)
    places, signs = draw.integers(0, SKETCH, details.size), draw.integers(0, 2, details.size) * 2 - 1
    return np.bincount(places, signs * details / norm, SKETCH).astype(np.float16)


def picture(volume: Array, height: int) -> NDArray[np.uint8]:
    """Axial, coronal and sagittal slice side by side, left on the left, all at the same scale.

    The sagittal one lies beside the midline, where it shows ventricles, grey and white matter.

    Args:
        volume: (H, W, D) in [0, 1], RAS.
        height: pixels at most; slices are not enlarged.
    """
    x, y, z = volume.shape[0] * 5 // 12, volume.shape[1] // 2, volume.shape[2] // 2
    views = [np.rot90(volume[:, :, z]), np.rot90(volume[:, y, :]), np.rot90(volume[x, :, :])]
    tall = max(view.shape[0] for view in views)
    rows = [np.pad(v, (((tall - len(v)) // 2, (tall - len(v) + 1) // 2), (0, 0))) for v in views]
    image = Image.fromarray((np.clip(np.concatenate(rows, 1), 0, 1) * 255).astype(np.uint8))
    if height < tall:
        image = image.resize((round(image.width * height / tall), height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def encode(pictures: Sequence[NDArray[np.uint8]]) -> bytes:
    """One picture of several below one another, as WebP."""
    wide = max(p.shape[1] for p in pictures)
    rows = [np.pad(p, ((0, 0), (0, wide - p.shape[1]))) for p in pictures]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
