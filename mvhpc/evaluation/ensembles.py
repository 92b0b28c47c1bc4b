"""Quantiles and scores of a distribution from a few draws of it."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]
RANKED = 19  # draws, the fewest whose ranks give quantiles from 5 to 95 %


def quantiles(draws: Floats, shares: Sequence[float]) -> Floats:
    """Predictive quantiles (N, Q): one more draw lies below them with probabilities ``shares``.

    By the ranks of the draws, or for a share beyond these by Student's t. Plain quantiles of 30 exact draws miss 15 %
    of new ones where 10 % are meant, and the mean of 3 with 1.645 of their SDs to either side 29 %.

    Args:
        draws: (N, M), M of at least 2.
        shares: Q of them, within (0, 1).

    Raises:
        ValueError: fewer than 2 draws.
    """
    m = draws.shape[1]
    if m < 2:
        raise ValueError(f"{m} draw: a distribution needs 2 or more")
    if (m + 1) * min(min(q, 1 - q) for q in shares) >= 1:
        return np.quantile(draws, shares, axis=1, method="weibull").T
    reach = math.sqrt(1 + 1 / m) * draws.std(1, ddof=1)  # (N,)
    return draws.mean(1)[:, None] + reach[:, None] * student.ppf(shares, m - 1)


def pit(draws: Floats, truth: Floats) -> Floats:
    """Probability integral transform (N,): the predicted probability of a value below the truth, as :func:`quantiles`.

    By the ranks of the draws, or of few by Student's t.

    Args:
        draws: (N, M), M of at least 2.
        truth: (N,); NaN gives NaN.
    """
    m = draws.shape[1]
    if m >= RANKED:
        ranks = (np.sort(draws, 1) < truth[:, None]).sum(1) + (np.sort(draws, 1) <= truth[:, None]).sum(1) + 1
        return np.where(np.isfinite(truth), ranks / (2 * (m + 1)), np.nan)
    sd = draws.std(1, ddof=1)
    reach = math.sqrt(1 + 1 / m) * np.maximum(sd, np.finfo(float).tiny)
    return np.asarray(student.cdf((truth - draws.mean(1)) / reach, m - 1))


def crps(draws: Floats, truth: Floats) -> Floats:
    """Continuous ranked probability score (N,), unbiased for the number of draws (Ferro 2014, eq. 8).

    Args:
        draws: (N, M), M of at least 2.
        truth: (N,).
    """
    m = draws.shape[1]
    error = np.abs(draws - truth[:, None]).mean(1)
    pairs = np.abs(draws[:, :, None] - draws[:, None, :]).sum((1, 2))
    return error - pairs / (2 * m * (m - 1))
