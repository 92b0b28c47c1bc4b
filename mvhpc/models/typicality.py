"""How usual a scan is among people that a model was not fitted to, as p-values of its distance from those it was."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

COMPONENTS = 10  # of the Mahalanobis distance; the later ones of a hundred people are noise
UNUSUAL = 0.005  # p-value of each of the two distances below which a scan is flagged


@dataclass(frozen=True)
class Typicality:
    """Distances of held-out people, whose logarithms are taken as normally distributed.

    Attributes:
        mean, sd: of the logarithms of the principal components' distance and of the rest's, (2,) float64.
        people: how many, at least two.
    """

    mean: Tensor
    sd: Tensor
    people: int

    @classmethod
    def of_people(cls, distances: Tensor) -> "Typicality":
        """The distances (N, 2) of people, each from components that were not fitted to that person."""
        logs = distances.clamp(min=1e-12).log()
        return cls(logs.mean(0), logs.std(0).clamp(min=1e-3), len(logs))

    def p_values(self, distances: Tensor) -> Tensor:
        """The probability that another of these people is as far away: (B, 2) for distances (B, 2)."""
        excess = (distances.clamp(min=1e-12).log() - self.mean) / self.sd / np.sqrt(1 + 1 / self.people)
        return torch.from_numpy(t.sf(excess.numpy(), self.people - 1))
