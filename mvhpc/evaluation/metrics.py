"""Errors of predictions, with intervals from a bootstrap over subjects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap

Floats = NDArray[np.float64]
RELIABLE = 20  # people, the fewest for a bootstrap
FEWEST = 6  # people; of fewer, no paired difference can be shown at 5 % (sign test: 2 * 0.5 ** 5 is 6 %)


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` subjects and its confidence interval, NaN below two subjects."""

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """Value, lower and upper end."""
        return self.value, self.low, self.high

    def format(self, digits: int) -> str:
        """``4.50 [4.10, 4.93]``, or ``4.50`` without an interval."""
        if not np.isfinite(self.value):
            return "-"
        value, low, high = (round(x, digits) + 0.0 for x in self.interval)  # without a minus before zeros
        text = f"{value:.{digits}f}"
        if np.isfinite(low):
            text += f" [{low:.{digits}f}, {high:.{digits}f}]"
        return text


def absolute_errors(predicted: ArrayLike, true: ArrayLike) -> Floats:
    """|predicted - true| per row (N,), NaN where either is missing."""
    return np.abs(np.asarray(predicted, float) - np.asarray(true, float))


def hits(predicted: Sequence[str | None], true: Sequence[str | None]) -> Floats:
    """1.0 where the class is right, 0.0 where it is wrong, NaN where either is missing: (N,)."""
    return np.array(
        [float(p == t) if isinstance(p, str) and isinstance(t, str) else np.nan for p, t in zip(predicted, true)]
    )


def mean_over_subjects(
    values: ArrayLike,
    subjects: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of per-row values and its percentile bootstrap interval, see :func:`over_subjects`.

    Args:
        values: (N,) errors or hits; NaN rows are left out.
        subjects: (N,) the subject of each row. None: a subject per row.
        confidence: of the interval.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The mean over rows, its interval, and the number of subjects.
    """
    rows: Floats = np.asarray(values, float)[:, None]
    return over_subjects(
        np.concatenate([rows, np.ones_like(rows)], 1), _ratio, subjects, confidence, resamples=resamples, seed=seed
    )


def share_of_subjects(values: ArrayLike, subjects: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """How often something is so, and its 95 % interval: as :func:`mean_over_subjects`, of values within [0, 1].

    Where it is always so, or never, every bootstrap sample says the same; there the interval is the exact one of the
    binomial law (Clopper and Pearson 1934), of as many trials as there are subjects.

    Args:
        values: (N,) 1.0 or 0.0; NaN rows are left out.
        subjects: (N,) the subject of each row. None: a subject per row.
        seed: of the bootstrap.
    """
    found = mean_over_subjects(values, subjects, seed=seed)
    if found.n < 2 or found.value not in (0.0, 1.0):
        return found
    exact = binomtest(round(found.n * found.value), found.n).proportion_ci(0.95, "exact")
    return Estimate(found.value, float(exact.low), float(exact.high), found.n)


def _ratio(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def over_subjects(
    rows: ArrayLike,
    statistic: Callable[[Floats], Floats],
    subjects: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A statistic of sums over rows and its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    The bootstrap draws subjects, so that several rows of one person (sessions, repeated folds) do not make the
    interval too narrow.

    Args:
        rows: (N, K); rows with a NaN are left out.
        statistic: of the sums of the K columns, (..., K) -> (...).
        subjects, confidence, resamples, seed: as in :func:`mean_over_subjects`.

    Returns:
        The statistic of all rows, its interval, and the number of subjects.
    """
    table: Floats = np.asarray(rows, float)
    names = np.arange(len(table)) if subjects is None else np.asarray(subjects)
    known = np.isfinite(table).all(1)
    if not known.any():
        return Estimate(np.nan, np.nan, np.nan, 0)
    sums, count = per_subject(table[known], names[known]), len(np.unique(names[known]))
    value = float(statistic(sums.sum(0)))
    if count < 2:
        return Estimate(value, np.nan, np.nan, count)
    interval = bootstrap(
        tuple(sums.T),
        lambda *columns, axis: statistic(np.stack([column.sum(axis) for column in columns], -1)),
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), count)


def per_subject(rows: Floats, subjects: Sequence[str] | NDArray[np.generic]) -> Floats:
    """The sums of rows (N, K) over each subject, (S, K), subjects sorted by name."""
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    sums: Floats = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, owner, rows)
    return sums
