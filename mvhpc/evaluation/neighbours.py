"""Nearest neighbours of drawn people: precision and recall, and whether people of the training were copied."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

NEAREST = 3  # neighbours that span the manifold, as in the paper
COPY = 1 / 3  # a copy is that much nearer to one person of the training than to the next
CHUNK = 64  # rows of a matrix of distances at a time
Floats = NDArray[np.float64]


def precision_recall(
    drawn: NDArray, real: NDArray, nearest: int = NEAREST
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Who of the drawn people looks real, and who of the real ones could be drawn.

    A point lies on the manifold of a set where it is as near to some point of it as that point's own k-th neighbour in
    the set (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2). Precision and recall are the means.

    Args:
        drawn: features (N, F).
        real: features (M, F).
        nearest: k.

    Returns:
        For each drawn person, whether it lies on the real people's manifold (N,); for each real one, whether it lies on
        that of the drawn ones (M,).

    Raises:
        ValueError: a set of k people or fewer.
    """
    if min(len(drawn), len(real)) <= nearest:
        raise ValueError(f"{len(drawn)} drawn and {len(real)} real people: more than {nearest} of each are needed")
    realistic = _distances(drawn, real) <= _radius(real, nearest)  # (N, M)
    covered = _distances(real, drawn) <= _radius(drawn, nearest)  # (M, N)
    return np.asarray(realistic.any(1)), np.asarray(covered.any(1))


def _radius(x: NDArray, nearest: int) -> Floats:
    """Distance of each point to its k-th neighbour in the set, (N,)."""
    distances: Floats = np.partition(_distances(x, x), nearest, axis=1)[:, nearest]  # 0: itself
    return distances


@dataclass(frozen=True)
class Copies:
    """Distances of N drawn people to those of the training and to held-out ones.

    Attributes:
        training, held_out: distance to the nearest person of each set, (N,); root mean square over features.
        nearest: index of the nearest person of the training, (N,).
        nearer: probability that the nearest person is one of the training, where as many of them are chosen at random
            as there are held-out ones, (N,). 0.5 is expected where nobody was learnt by heart.
        copied: whether it is a copy (N,): less than a third as far from one person of the training as from any other
            (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize").
    """

    training: Floats
    held_out: Floats
    nearest: NDArray[np.int64]
    nearer: Floats
    copied: NDArray[np.bool_]


def find_copies(
    drawn: NDArray, training: NDArray, held_out: NDArray, subjects: NDArray | None = None, paired: bool = False
) -> Copies:
    """Compare drawn people with those of the training and with held-out ones.

    Args:
        drawn: (N, F).
        training: (T, F), of at least 2 subjects, and not fewer rows than there are held-out ones.
        held_out: (M, F), M of at least 2.
        subjects: (T,) the subject of each row of ``training``; one each where not given. Scans of one person are not
            the "other" of one another.
        paired: whether drawn person i has the scalars of held-out person i, who then does not count for it: nobody
            in the training was chosen to be alike.
    """
    owners = np.arange(len(training)) if subjects is None else np.asarray(subjects)
    rows = []
    for start in range(0, len(drawn), CHUNK):
        part = drawn[start : start + CHUNK]
        near, far = _distances(part, training), _distances(part, held_out)
        if paired:
            far[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        rows += [_compare(a, b, owners, len(held_out) - paired) for a, b in zip(near, far)]
    first, other, nearest, second, nearer = map(np.array, zip(*rows, strict=True))
    return Copies(first, other, nearest, nearer, first < COPY * second)


def _distances(x: NDArray, y: NDArray) -> Floats:
    """Root mean squared difference of the rows of (N, F) and (M, F), (N, M); 0 for equal rows."""
    first, second = (torch.from_numpy(np.ascontiguousarray(rows)) for rows in (x, y))
    apart = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    found: Floats = apart.double().numpy() / np.sqrt(x.shape[1])
    return found


def _compare(near: Floats, far: Floats, owners: NDArray, m: int) -> tuple[float, float, int, float, float]:
    """Nearest of the training and of the held-out, who it is, the next other one, and the chance of being nearer."""
    i = int(near.argmin())
    others = near[owners != owners[i]]
    closer = int((near < far.min()).sum())
    return float(near[i]), float(far.min()), i, float(others.min()), 1 - _none_of(closer, len(near), m)


def _none_of(special: int, total: int, chosen: int) -> float:
    """Probability that of ``chosen`` out of ``total``, none is one of the ``special`` ones: C(T - k, m) / C(T, m)."""
    chosen = min(chosen, total)
    if special + chosen > total:
        return 0.0

    def log_ways(n: int) -> float:
        return float(gammaln(n + 1) - gammaln(chosen + 1) - gammaln(n - chosen + 1))

    return float(np.exp(log_ways(total - special) - log_ways(total)))
