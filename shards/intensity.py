"""The intensities of a brain: foreground percentiles to [0, 1]."""

import numpy as np
from numpy.typing import NDArray

from shards.foreground import Foreground, bounds_of, foreground
from shards.percentiles import Ordered

PERCENTILE = np.float32(99.5)  # of the foreground is scaled to 1
FAINT = 1e-3  # of bright tissue
RINGING = 0.1  # share of the foreground; fewer values below the background are errors of interpolation


def rescale(found: Foreground) -> NDArray[np.float32]:
    """Foreground percentiles 0 to 99.5 -> [0, 1], background -> 0.

    The background is the most frequent value on the volume's faces. This holds for brain-extracted volumes with any
    background (0, -1024, 0 among negative values); in a volume with noise in the air it removes almost nothing. What
    differs from it by less than a thousandth of the bright tissue is background too: interpolation leaves it there.

    The percentiles leave out what no tissue has: values below the background where they are few (interpolation beside
    edges), and those outside of :func:`shards.foreground.tissue_bounds` (dead pixels, spikes, overflows).

    Returns:
        (x, y, z), as ``found.voxels``.

    Raises:
        ValueError: a constant volume.
    """
    empty, top = found.empty, PERCENTILE / np.float32(100)
    if not len(found.strengths):
        raise ValueError(f"constant volume: all voxels are {empty:g}")
    least = np.float32(FAINT) * min(found.strengths.quantile(top), np.float32(bounds_of(found.strengths)[1]))
    inside = found.strength > least
    if empty == 0 and found.voxels.min() >= 0:  # strengths are the values
        values = found.strengths
        start = values.below(least, inclusive=True)
    else:
        values, start = Ordered(found.voxels[inside]), 0
    lowest, highest = bounds_of(values, start)
    count = len(values) - start
    if max(0, values.below(empty) - start) / count < RINGING:
        lowest = max(lowest, empty)
    first, stop = max(start, values.below(lowest)), values.below(highest, inclusive=True)
    low, high = float(values.at(first)), float(values.quantile(top, first, stop))
    if not high > low:
        if fainter := len(found.strengths) - count:
            raise ValueError(
                f"{count} voxels are {low:g}, and the other {fainter} differ a thousand times less from the "
                "background: overflows, or a damaged file"
            )
        raise ValueError(f"constant volume: the foreground has no contrast (all {low:g})")
    scaled = found.voxels - np.float32(low)
    scaled /= np.float32(high - low)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= inside
    return scaled


def intensity_scale(voxels: NDArray[np.float32]) -> tuple[float, float]:
    """The values of a scan that become 0 and 1 in its canonical volume.

    Raises:
        ValueError: a constant volume.
    """
    found = foreground(voxels)
    scaled = rescale(found)
    inner = (scaled > 0) & (scaled < 1)
    if not inner.any() or scaled[inner].min() == scaled[inner].max():
        raise ValueError("constant volume: the foreground has no contrast")
    shares, values = scaled[inner].astype(np.float64), found.voxels[inner].astype(np.float64)
    a, b = int(shares.argmin()), int(shares.argmax())
    span = (values[b] - values[a]) / (shares[b] - shares[a])
    low = values[a] - shares[a] * span
    return float(low), float(low + span)
