"""Pairs of records that look like the same person, from sketches of the details of their brains.

The correlation of two brains is compared with those of each with its nearest neighbours (cross-domain similarity local
scaling, Conneau et al., 2018): scans of one scanner are alike without being of one person.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SAMPLE = 2000  # records that give the neighbours of each one, and whose pairs give the distribution
NEIGHBOURS = 10
BLOCK = 512  # records that are compared with all others at once
TAIL = 0.99  # quantile whose distance from the median gives the scale of the upper tail
FALSE_PAIRS = 0.01  # expected number of pairs above the limit, where all records are of different people
SHOWN = 300  # pairs that are kept


@dataclass(frozen=True)
class Pair:
    """Two records that look alike, or do not although they should.

    Attributes:
        first, second: numbers of the records.
        correlation: of the details of their brains.
        deviation: of the correlation less that with their neighbours, in standard deviations from the median.
        repeat: whether both are of one subject.
    """

    first: int
    second: int
    correlation: float
    deviation: float
    repeat: bool


@dataclass(frozen=True)
class Pairs:
    """The result of a comparison of all pairs.

    Attributes:
        limit: deviation above which two brains are likely the same person's; chance gives 0.01 such pairs in a
            data set. inf where there are too few records to tell.
        alike: pairs above the limit, those of different subjects first, then the most alike; at most :data:`SHOWN`.
        count: of all pairs of different subjects above the limit.
        unlike: pairs of one subject below the limit, the least alike first; at most :data:`SHOWN`.
    """

    limit: float
    alike: list[Pair]
    count: int
    unlike: list[Pair]


def compare_all(sketches: NDArray[np.float16], subjects: Sequence[str]) -> Pairs:
    """Find the pairs of a data set.

    Args:
        sketches: (n, numbers), see :class:`shards.audit.measure.Measured`.
        subjects: of each record.
    """
    n = len(sketches)
    names = np.unique(np.asarray(subjects, str), return_inverse=True)[1]
    if len(set(names)) <= NEIGHBOURS:
        return Pairs(float("inf"), [], 0, [])
    mean = sketches.mean(0, dtype=np.float64).astype(np.float32)
    chosen = np.arange(0, n, -(-n // SAMPLE))
    sample = _normalize(sketches[chosen], mean)
    blocks = [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]
    near = np.concatenate(
        [_neighbours(_normalize(sketches[b], mean) @ sample.T, names[b, None] == names[chosen]) for b in blocks]
    )
    median, scale = _distribution(sample @ sample.T - (near[chosen, None] + near[chosen]) / 2, names[chosen])
    limit = float(stats.norm.isf(FALSE_PAIRS / (n * (n - 1) / 2)))
    alike: list[Pair] = []
    unlike: list[Pair] = []
    count = 0
    for one in blocks:
        rows = _normalize(sketches[one], mean)
        for other in blocks[one.start // BLOCK :]:
            correlations = rows @ _normalize(sketches[other], mean).T
            deviations = (correlations - (near[one, None] + near[other]) / 2 - median) / scale
            repeat = names[one, None] == names[other]
            wanted = (deviations > limit) | repeat
            places = zip(*np.nonzero(np.triu(wanted, 1) if one == other else wanted))
            found = [
                Pair(
                    one.start + int(a),
                    other.start + int(b),
                    correlation=float(correlations[a, b]),
                    deviation=float(deviations[a, b]),
                    repeat=bool(repeat[a, b]),
                )
                for a, b in places
            ]
            above = [p for p in found if p.deviation > limit]
            count += sum(not p.repeat for p in above)
            alike = sorted([*alike, *above], key=lambda p: (p.repeat, -p.deviation, p.first, p.second))[:SHOWN]
            unlike += [p for p in found if p.deviation <= limit]
            unlike = sorted(unlike, key=lambda p: (p.deviation, p.first, p.second))[:SHOWN]
    return Pairs(limit, alike, count, unlike)


def _normalize(sketches: NDArray[np.float16], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Differences from the mean, of norm 1 (0 for a volume without details)."""
    rows = sketches.astype(np.float32)
    empty = ~rows.any(1)
    rows -= mean
    rows[empty] = 0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms, norms, 1)


def _neighbours(correlations: NDArray[np.float32], same: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mean correlation of each record with those of other subjects that are most like it, but the first, which may be a
    duplicate."""
    others = np.where(same, -np.inf, correlations)
    nearest = np.sort(np.partition(others, -NEIGHBOURS - 1, axis=1)[:, -NEIGHBOURS - 1 :], axis=1)[:, :-1]
    return np.asarray(np.ma.masked_invalid(nearest).mean(1).filled(0), np.float32)


def _distribution(values: NDArray[np.float32], names: NDArray[np.int64]) -> tuple[float, float]:
    """Median of the pairs of different subjects, and the standard deviation of a normal distribution of that tail."""
    first, second = np.triu_indices(len(values), 1)
    median, high = np.quantile(values[first, second][names[first] != names[second]], (0.5, TAIL))
    return float(median), float(high - median) / float(stats.norm.isf(1 - TAIL)) or 1.0
