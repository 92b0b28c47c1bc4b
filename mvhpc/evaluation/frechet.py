"""Fréchet distance of two sets of features (FID), its interval, its value for infinitely many people, and its floor.

Heusel et al. 2017 (arXiv:1706.08500, eq. 6); the bias of few samples: Chong and Forsyth 2020 (arXiv:1911.07023).
Features are one array (N, S, F) for each of P planes: N people, S slices of each, F features. The FID of several planes
is the mean of theirs, as in MAISI (arXiv:2409.11169). People, not slices, are drawn and left out: slices
of one brain are alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svdvals

from mvhpc.evaluation.metrics import Estimate

CONFIDENCE = 0.95
SIZES = 8  # numbers of people of an extrapolation, from half of them to all
REPEATS = 20  # random halves, and random subsets of each size
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Planes = Sequence[NDArray[np.floating]]


def frechet_distance(x: Floats, y: Floats, wx: NDArray | None = None, wy: NDArray | None = None) -> float:
    """|mean difference|² + tr(Cx + Cy - 2 (Cx Cy)^½), C the covariances.

    With Cx = A'A and Cy = B'B, the trace of the root is the sum of the singular values of A B', which are real, and
    cheap for fewer samples than features: 1 ms for 100 samples of 256 features. The root of the product of the
    covariances (pytorch-fid, MONAI's ``FIDMetric``) agrees to 2e-7 there, may become complex, and takes 700 times as
    long.

    Args:
        x: (N, F); y: (M, F).
        wx, wy: how often each row counts, (N,) and (M,); once where not given.

    Returns:
        The distance, at least 0.
    """
    (mx, a), (my, b) = _moments(x, wx), _moments(y, wy)
    apart = float(np.square(mx - my).sum())
    return max(0.0, apart + float(np.square(a).sum() + np.square(b).sum() - 2 * svdvals(a @ b.T).sum()))


def _moments(x: Floats, weights: NDArray | None) -> tuple[Floats, Floats]:
    """Mean (F,), and a matrix A (min(N, F), F) such that A'A is the covariance (of N - 1 degrees of freedom)."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    x, w = x[w > 0], w[w > 0]
    mean = w @ x / w.sum()
    a = (x - mean) * np.sqrt(w / (w.sum() - 1))[:, None]
    return mean, np.asarray(np.linalg.qr(a, mode="r")) if len(a) > a.shape[1] else a


@dataclass(frozen=True)
class Sets:
    """Features of drawn and of real people, of equal numbers.

    Attributes:
        drawn, real: of each plane (N, S, F).
        paired: whether drawn person i was drawn for the scalars of real person i; both then stay together where people
            are drawn or left out.
    """

    drawn: Planes
    real: Planes
    paired: bool

    def __post_init__(self) -> None:
        shapes = [[x.shape for x in planes] for planes in (self.drawn, self.real)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"features {shapes[0]} and {shapes[1]}: equal numbers of people are needed")

    @property
    def people(self) -> int:
        """N."""
        return len(self.drawn[0])

    def take(self, drawn: NDArray, real: NDArray, paired: bool) -> "Sets":
        """Some of the people, by their indices."""
        return Sets([x[drawn] for x in self.drawn], [x[real] for x in self.real], paired)

    def floor(self, rng: np.random.Generator) -> "Sets":
        """Random halves of the real people, one in the place of the drawn ones."""
        order, half = rng.permutation(self.people), self.people // 2
        return Sets(self.real, self.real, False).take(order[:half], order[half : 2 * half], False)

    def halves(self, rng: np.random.Generator) -> "Sets":
        """As many drawn and real people as :meth:`floor` has, of different scalars where they are paired."""
        order, half = rng.permutation(self.people), self.people // 2
        return self.take(order[:half], order[half : 2 * half], False)


def fid(sets: Sets, drawn: Counts | None = None, real: Counts | None = None) -> Floats:
    """The FID of each plane and last their mean, (P + 1,).

    Args:
        sets: of features.
        drawn, real: how often each person counts, (N,); once where not given.
    """

    def rows(x: NDArray, counts: Counts | None) -> tuple[NDArray, NDArray | None]:
        return x.reshape(-1, x.shape[-1]), None if counts is None else np.repeat(counts, x.shape[1])

    found = []
    for a, b in zip(sets.drawn, sets.real):
        (x, wx), (y, wy) = rows(a, drawn), rows(b, real)
        found.append(frechet_distance(x, y, wx, wy))
    return np.array([*found, np.mean(found)])


def intervals(sets: Sets, resamples: int, rng: np.random.Generator) -> list[Estimate]:
    """The FID of each plane and of their mean, with 95 % intervals for its expectation at this number of people.

    A bootstrap of people. Resampled people are fewer different ones and their FID is larger, so the deviations from its
    own mean are taken, and put around the FID.
    """
    value = fid(sets)
    drawn = []
    for _ in range(resamples):
        first = _resample(sets.people, rng)
        drawn.append(fid(sets, first, first if sets.paired else _resample(sets.people, rng)))
    deviations = np.stack(drawn) - np.mean(drawn, 0)
    edge = (1 - CONFIDENCE) / 2
    low, high = (np.maximum(value + np.quantile(deviations, q, axis=0), 0) for q in (edge, 1 - edge))
    return _estimates(value, low, high, sets.people)


def _estimates(values: Floats, low: Floats, high: Floats, n: int) -> list[Estimate]:
    return [Estimate(float(v), float(a), float(b), n) for v, a, b in zip(values, low, high, strict=True)]


def _resample(n: int, rng: np.random.Generator) -> Counts:
    return np.bincount(rng.integers(0, n, n), minlength=n)


def at_half(sets: Sets, draw: Callable[[Sets, np.random.Generator], Sets], rng: np.random.Generator) -> list[Estimate]:
    """The FID of each plane and of their mean over random halves, and the range in which 95 % of halves lie.

    Args:
        sets: of features.
        draw: :meth:`Sets.floor` (real against real), or :meth:`Sets.halves` for drawn people at an equal number.
        rng: of the halves.
    """
    found = np.stack([fid(draw(sets, rng)) for _ in range(REPEATS)])
    edge = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [edge, 1 - edge], axis=0)
    return _estimates(found.mean(0), low, high, sets.people // 2)


@dataclass(frozen=True)
class Extrapolation:
    """The FID against the number of people, and the line in 1 / n through it.

    Attributes:
        sizes: numbers of people, (K,).
        values: mean FID over random subsets of each size, of each plane and their mean, (K, P + 1).
        limit: the line at 1 / n = 0, (P + 1,); below 0 where noise is larger than the distance.
    """

    sizes: Counts
    values: Floats
    limit: Floats


def extrapolate(sets: Sets, rng: np.random.Generator) -> Extrapolation:
    """Extrapolate the FID to infinitely many people by a line in 1 / n (Chong and Forsyth 2020, section 4).

    The bias of the FID is in 1 / n where the features that vary are fewer than the samples; with fewer samples the line
    removes most of it, not all.
    """
    sizes = np.unique(np.linspace(sets.people / 2, sets.people, SIZES).round().astype(int))
    values = []
    for size in sizes:
        found = []
        for _ in range(1 if size == sets.people else REPEATS):
            first = rng.permutation(sets.people)[:size]
            second = first if sets.paired else rng.permutation(sets.people)[:size]
            found.append(fid(sets.take(first, second, sets.paired)))
        values.append(np.mean(found, 0))
    line = np.polynomial.polynomial.polyfit(1 / sizes, np.stack(values), 1)
    return Extrapolation(sizes, np.stack(values), line[0])
