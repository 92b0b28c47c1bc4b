"""Errors of predictions, with intervals from a bootstrap over subjects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap


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
        text = f"{self.value:.{digits}f}"
        if np.isfinite(self.low):
            text += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return text


def absolute_errors(predicted: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """|predicted - true| per row (N,), NaN where either is missing."""
    return np.abs(np.asarray(predicted, float) - np.asarray(true, float))


def hits(predicted: Sequence[str | None], true: Sequence[str | None]) -> NDArray[np.float64]:
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
    """Mean of per-row values and its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    The bootstrap draws subjects, so that several rows of one person (sessions, repeated folds) do not make the
    interval too narrow.

    Args:
        values: (N,) errors or hits; NaN rows are left out.
        subjects: (N,) the subject of each row. None: a subject per row.
        confidence: of the interval.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The mean over rows, its interval, and the number of subjects.
    """
    rows: NDArray[np.float64] = np.asarray(values, float)
    names = np.arange(len(rows)) if subjects is None else np.asarray(subjects)
    known = np.isfinite(rows)
    if not known.any():
        return Estimate(np.nan, np.nan, np.nan, 0)
    _, owner = np.unique(names[known], return_inverse=True)
    total, count = np.bincount(owner, weights=rows[known]), np.bincount(owner).astype(float)  # (subjects,)
    mean = float(total.sum() / count.sum())
    if len(total) < 2:
        return Estimate(mean, np.nan, np.nan, len(total))
    interval = bootstrap(
        (total, count),
        lambda t, c, axis: t.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(total))
