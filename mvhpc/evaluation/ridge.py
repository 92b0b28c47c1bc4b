"""Ridge regression of numbers and classes on voxels: a reading of brains that is independent of any network."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STRENGTHS = np.logspace(-6, 3, 28)  # of regularisation, in units of the mean squared length of the features
Floats = NDArray[np.float64]


class Ridge:
    """Ridge regression of T targets on F features, in its dual form; its strength has the least leave-one-out error.

    Attributes:
        means: of the features, (F,).
        weights: (F, T).
        centres: of the targets, (T,).
        strength: of the regularisation.
    """

    def __init__(self, x: NDArray, y: NDArray) -> None:
        """Fit to features (N, F) and targets (N, T), N of at least 3."""
        self.means, self.centres = x.mean(0), y.mean(0)
        centred, rest = x - self.means, y - self.centres
        values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        values = values.clip(min=0)
        turned = vectors.T @ rest  # (N, T)

        def error(strength: float) -> float:
            """Mean squared leave-one-out error: the residual by one less the leverage."""
            shrunk = values / (values + strength)
            leverage = np.square(vectors) @ shrunk + 1 / len(x)
            left = rest - vectors @ (shrunk[:, None] * turned)
            return float(np.square(left / (1 - leverage)[:, None]).mean())

        self.strength = min((values.mean() + 1e-12) * STRENGTHS, key=error)
        self.weights = centred.T @ (vectors @ (turned / (values + self.strength)[:, None]))

    def predict(self, x: NDArray) -> Floats:
        """Targets (M, T) of features (M, F)."""
        found: Floats = self.centres + (x - self.means) @ self.weights
        return found


def read_numbers(known: NDArray, values: Sequence[float], unknown: NDArray) -> Floats:
    """Numbers (M,) of features (M, F), learnt from features (N, F) and their ``values``."""
    return Ridge(known, np.array(values, float)[:, None]).predict(unknown)[:, 0]


def read_classes(known: NDArray, values: Sequence[str], unknown: NDArray) -> list[str]:
    """Classes of features (M, F), by regression of indicators on features (N, F) of known classes."""
    names = sorted(set(values))
    indicators = np.array([[value == name for name in names] for value in values], float)
    return [names[i] for i in Ridge(known, indicators).predict(unknown).argmax(1)]
