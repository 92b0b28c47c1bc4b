"""How unusual each record is within its data set."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shards.qc.limits import LIMITS

NORMAL_MAD = 1.4826  # standard deviation of a normal distribution with median absolute deviation 1
NORMAL_MEAN_AD = 1.2533  # with mean absolute deviation 1
AT_LIMIT = 10.0  # deviation of a figure of quality control at its limit, at most
ONE_SIDED = {"mean_likeness": -1, "left_right": -1, "up_down": -1, "symmetry": -1, "turned_degrees": 1, "histogram": 1}


def histogram_distances(histograms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wasserstein distance of each histogram to the median one, in units of the intensities.

    Args:
        histograms: (n, bins), of values in [0, 1].
    """
    median = np.median(histograms, axis=0)
    median /= median.sum() or 1
    return np.abs(np.cumsum(histograms - median, axis=1)).mean(1)


def deviations(measures: pd.DataFrame) -> pd.DataFrame:
    """Robust deviations from the median, in standard deviations of a normal distribution.

    Each side of the median has its own scale (double median absolute deviation), so a skewed measure does not make
    outliers of its longer tail. Where only one direction means a fault, the other one counts as 0. A figure that hardly
    varies is measured by its limit of quality control, so that a harmless value does not stand out.

    Args:
        measures: a column ``VARIABLE.MEASURE`` each; nan where missing.

    Returns:
        A table of the same form; 0 where missing.
    """
    columns = {c: _deviations(measures[c].to_numpy(float), str(c).split(".")[-1]) for c in measures}
    return pd.DataFrame(columns, index=measures.index)


def _deviations(values: NDArray[np.float64], measure: str) -> NDArray[np.float64]:
    known = np.isfinite(values)
    result = np.zeros(len(values))
    if not known.any():
        return result
    median = float(np.median(values[known]))
    distance = values - median
    for side in (-1, 1):
        there = known & (distance * side > 0)
        if ONE_SIDED.get(measure, side) == side and there.any():
            result[there] = distance[there] / _scale(
                np.abs(distance[known & (distance * side >= 0)]), measure, median, side
            )
    return result


def _scale(away: NDArray[np.float64], measure: str, median: float, side: int) -> float:
    """Standard deviation of a measure on one side of its median.

    Args:
        away: distances from the median, not all 0.
        measure: its name.
        median: of the measure.
        side: 1 above the median, -1 below.
    """
    spread = NORMAL_MAD * float(np.median(away)) or NORMAL_MEAN_AD * float(away.mean())
    limits = [limit.high if side > 0 else limit.low for limit in LIMITS if limit.figure == measure]
    room = [side * (limit - median) for limit in limits if np.isfinite(limit) and side * (limit - median) > 0]
    return max([spread, *(r / AT_LIMIT for r in room[:1])])
