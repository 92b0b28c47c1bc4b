"""Paired comparisons of every two methods that answered one query, with simultaneous intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mvhpc.evaluation.metrics import FEWEST, Estimate, Floats, per_subject

CHUNK = 1000  # bootstrap samples at a time


@dataclass(frozen=True)
class Difference:
    """Two methods on the subjects whom both answered.

    Attributes:
        first, second: places of the methods.
        gap: mean score of the first less that of the second, with its simultaneous interval; NaN where they share
            fewer than :data:`.metrics.FEWEST` subjects.
        p: of no difference, adjusted for the number of comparisons; NaN where there is no interval.
    """

    first: int
    second: int
    gap: Estimate
    p: float


def compare_all(
    scores: Floats,
    subjects: Sequence[str],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Compare every two of M methods.

    All intervals hold together with probability ``confidence``: differences are divided by their bootstrap standard
    errors, and the largest of them over all pairs decides how far each interval reaches (single-step max-t, Westfall
    and Young 1993; Romano and Wolf 2005). The bootstrap draws subjects, the same for all pairs.

    Args:
        scores: (N, M) errors or hits; NaN where a method has no answer.
        subjects: (N,) the subject of each row.
        confidence: of all intervals together.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        One entry for each pair that shares subjects.
    """
    names = np.asarray(subjects)
    result: list[Difference] = []
    found: list[tuple[int, int, Floats]] = []  # pair, and its totals and counts (S, 2) by subject
    people: list[int] = []
    for i, j in combinations(range(scores.shape[1]), 2):
        apart = scores[:, i] - scores[:, j]
        known = np.isfinite(apart)
        sums = per_subject(np.stack([np.where(known, apart, 0.0), known.astype(float)], 1), names)
        shared = int((sums[:, 1] > 0).sum())
        if shared >= FEWEST:
            found.append((i, j, sums))
            people.append(shared)
        elif shared:
            mean = float(apart[known].mean())
            result.append(Difference(i, j, Estimate(mean, np.nan, np.nan, shared), np.nan))
    if not found:
        return result
    total, count = (np.stack([sums[:, k] for *_, sums in found], 1) for k in (0, 1))  # (S, P)
    mean = total.sum(0) / count.sum(0)  # (P,)
    drawn = _bootstrap(total, count, mean, resamples, seed)  # (B, P)
    error = drawn.std(0, ddof=1)
    certain = error <= 1e-12 * np.maximum(1, np.abs(mean))  # the same answers, or a constant difference
    scale = np.where(certain, 1.0, error)
    largest = np.where(certain, 0.0, np.abs(drawn - mean) / scale).max(1)  # (B,)
    reach = np.quantile(largest, confidence)
    for k, (i, j, _) in enumerate(found):
        half = 0.0 if certain[k] else float(reach * error[k])
        exceeding = int((largest >= np.abs(mean[k]) / scale[k]).sum())
        p = float(mean[k] == 0) if certain[k] else (1 + exceeding) / (1 + resamples)
        p = max(p, 0.5 ** (people[k] - 1))  # a sign test says no more
        gap = Estimate(float(mean[k]), float(mean[k]) - half, float(mean[k]) + half, people[k])
        result.append(Difference(i, j, gap, p))
    return sorted(result, key=lambda d: (d.first, d.second))


def _bootstrap(total: Floats, count: Floats, mean: Floats, resamples: int, seed: int) -> Floats:
    """Means (B, P) of resampled subjects; of a sample without any subject of a pair, the pair's mean."""
    rng, size = np.random.default_rng(seed), len(total)
    parts = []
    for first in range(0, resamples, CHUNK):
        weights = rng.multinomial(size, np.full(size, 1 / size), min(CHUNK, resamples - first)).astype(float)
        counts = weights @ count
        parts.append(np.where(counts > 0, weights @ total / np.maximum(counts, 1), mean))
    return np.concatenate(parts)
