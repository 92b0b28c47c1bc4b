"""Whether predicted distributions and probabilities hold: coverage, calibration error, reliability."""

from dataclasses import dataclass

import numpy as np

from mvhpc.evaluation.metrics import Floats

SHARES = (50, 80, 90, 95)  # %, of central intervals
BINS = 10  # of probabilities and of the histogram of PIT values
SIMULATIONS = 1000


def inside(pit: Floats, share: float) -> Floats:
    """1.0 where the truth lies in the central interval of ``share`` %, else 0.0; NaN where ``pit`` is: (N,).

    Args:
        pit: probability integral transforms, the predicted probability below the truth, (N,) within [0, 1].
        share: %.
    """
    return np.where(np.isfinite(pit), (np.abs(2 * pit - 1) <= share / 100 + 1e-9).astype(float), np.nan)


@dataclass(frozen=True)
class Reliability:
    """How often the most probable class is right, by its predicted probability.

    Attributes:
        confidence, accuracy: means in each bin that has people, (bins,).
        people: in these bins, (bins,).
    """

    confidence: Floats
    accuracy: Floats
    people: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: mean over people of |accuracy - confidence| of their bin."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.people))


def reliability(confidence: Floats, right: Floats, bins: int = BINS) -> Reliability:
    """Reliability in bins of equal width (Guo et al. 2017, section 2).

    Args:
        confidence: predicted probability of the most probable class, (N,), N of at least 1.
        right: 1.0 where this class is the true one, else 0.0, (N,).
        bins: over [0, 1].
    """
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    people, sure, hit = (np.bincount(place, weights, bins) for weights in (None, confidence, right))
    used = people > 0
    return Reliability(sure[used] / people[used], hit[used] / people[used], people[used].astype(float))


def calibrated_error(confidence: Floats, seed: int = 0) -> float:
    """The expected calibration error of as many people whose classes follow the predicted probabilities.

    Of few people it is far from 0: what a measured error has to be held against.
    """
    rng = np.random.default_rng(seed)
    drawn = (rng.random((SIMULATIONS, len(confidence))) < confidence).astype(float)
    return float(np.mean([reliability(confidence, right).error for right in drawn]))
