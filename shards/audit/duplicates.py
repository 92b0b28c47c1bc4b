"""Pairs of records that look like the same person, from sketches of the details of their brains."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SAMPLE = 2000  # records whose pairs give the distribution of the correlations
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
        repeat: whether both are of one subject.
    """

    first: int
    second: int
    correlation: float
    repeat: bool


@dataclass(frozen=True)
class Pairs:
    """The result of a comparison of all pairs.

    Attributes:
        limit: correlation above which two brains are likely the same person's; chance gives 0.01 such pairs in a
            data set. inf for fewer than three records.
        alike: pairs above the limit, the most alike first; at most :data:`SHOWN`.
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
    names = np.unique(np.asarray(subjects, str), return_inverse=True)[1]
    n = len(sketches)
    mean = sketches.mean(0, dtype=np.float64).astype(np.float32)
    limit = _limit(_normalize(sketches[:: -(-n // SAMPLE) if n else 1], mean), names[:: -(-n // SAMPLE) if n else 1], n)
    alike: list[Pair] = []
    unlike: list[Pair] = []
    count = 0
    for start in range(0, n, BLOCK):
        rows = _normalize(sketches[start : start + BLOCK], mean)
        for other in range(start, n, BLOCK):
            products = rows @ _normalize(sketches[other : other + BLOCK], mean).T
            repeat = names[start : start + BLOCK, None] == names[None, other : other + BLOCK]
            wanted = (products > limit) | repeat
            first, second = np.nonzero(np.triu(wanted, 1) if start == other else wanted)
            found = [
                Pair(start + int(a), other + int(b), float(products[a, b]), bool(repeat[a, b]))
                for a, b in zip(first, second)
            ]
            count += sum(p.correlation > limit and not p.repeat for p in found)
            alike = _most([*alike, *(p for p in found if p.correlation > limit)], -1)
            unlike = _most([*unlike, *(p for p in found if p.repeat and p.correlation <= limit)], 1)
    return Pairs(limit, alike, count, unlike if np.isfinite(limit) else [])


def _most(pairs: list[Pair], sign: int) -> list[Pair]:
    """Pairs of different subjects first, because repeats are expected to be alike."""
    return sorted(pairs, key=lambda p: (p.repeat, sign * p.correlation, p.first, p.second))[:SHOWN]


def _normalize(sketches: NDArray[np.float16], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Differences from the mean, of norm 1 (0 for a volume without details)."""
    rows = sketches.astype(np.float32)
    empty = ~rows.any(1)
    rows -= mean
    rows[empty] = 0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms, norms, 1)


def _limit(sample: NDArray[np.float32], names: NDArray[np.int64], records: int) -> float:
    """The correlation above which chance gives :data:`FALSE_PAIRS` pairs, for a normal distribution of that tail."""
    first, second = np.triu_indices(len(sample), 1)
    different = names[first] != names[second]
    if different.sum() < 3:
        return float("inf")
    correlations = (sample @ sample.T)[first, second][different]
    median, high = np.quantile(correlations, (0.5, TAIL))
    scale = (high - median) / stats.norm.isf(1 - TAIL)
    return float(median + scale * stats.norm.isf(FALSE_PAIRS / (records * (records - 1) / 2)))
