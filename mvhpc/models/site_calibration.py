"""Calibration of predictions at a site that the model was not trained on, by some labelled people of it.

A number's mean is shifted and stretched by Bayesian linear regression, and its law widened so that its central 90 %
interval is the conformal one: by the scores of people who were each left out of the regression (Barber et al. 2021).
A category's logits are shifted and divided by a temperature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from mvhpc.diffusion.laws import LEAST, Law, mixture, parts
from mvhpc.models.conformal import FEWEST, conformal_temperature, needed_stretch

STRETCH_SD = 0.5  # of the normal prior of a number's stretch, about 1
OFFSET_SD, LOG_SD = 2.0, math.log(2)  # of the normal priors of logits' shifts and of the logarithm of a temperature


@dataclass(frozen=True)
class SiteCalibration:
    """What happens to the laws of a scalar.

    Attributes:
        shift: added to the mean of a number (one, in the scale of z_0), or to the logits of the classes (K).
        stretch: multiplies the mean of a number before; 1 for a category.
        temperature: widens the law.
        note: what is doubtful about it, for the reader of an answer; empty for nothing.
    """

    shift: tuple[float, ...]
    stretch: float
    temperature: float
    note: str = ""

    def apply(self, law: Law, rows: Tensor) -> Law:
        """The law of B people, calibrated in ``rows`` (B,) bool and as it is in the others."""
        if isinstance(law, Tensor):
            logits = (law.clamp(min=LEAST).log() + torch.tensor(self.shift, dtype=law.dtype)) / self.temperature
            return torch.where(rows[:, None], logits.softmax(1), law)
        logs, means, sds = parts(law)
        middle = law.mean[:, None]
        moved = self.shift[0] + self.stretch * middle + self.temperature * (means - middle)
        return mixture(
            logs, torch.where(rows[:, None], moved, means), torch.where(rows[:, None], self.temperature * sds, sds)
        )


def calibrate_site(law: Law, truth: Tensor, stretched: bool = True) -> SiteCalibration:
    """The calibration by N people of a site.

    Args:
        law: predicted for them.
        truth: z_0 (N, 1), or classes (N,).
        stretched: whether the mean of a number is stretched too; otherwise it is shifted alone.

    Raises:
        ValueError: fewer than ten people.
    """
    if len(truth) < FEWEST:
        raise ValueError(f"{len(truth)} people; an interval of 90 % needs at least {FEWEST}")
    if isinstance(law, Tensor):
        return _of_classes(law, truth)
    mean, y = law.mean.numpy(), truth[:, 0].double().numpy()
    shift, stretch = _regression(mean, y, stretched)
    errors = left_out_errors(mean, y, stretched)
    temperature = conformal_temperature(needed_stretch(law, torch.from_numpy(errors)))
    return SiteCalibration((shift,), stretch, temperature)


def left_out_errors(
    mean: NDArray[np.float64], truth: NDArray[np.float64], stretched: bool = True
) -> NDArray[np.float64]:
    """The error about each of N people of a calibration by the others, (N,).

    Args:
        mean: of the predicted laws, (N,).
        truth: (N,).
        stretched: as :func:`calibrate_site` takes it.
    """
    errors = np.empty(len(truth))
    for i in range(len(truth)):
        left = np.arange(len(truth)) != i
        a, b = _regression(mean[left], truth[left], stretched)
        errors[i] = truth[i] - a - b * mean[i]
    return errors


def _regression(x: NDArray[np.float64], y: NDArray[np.float64], stretched: bool) -> tuple[float, float]:
    """Intercept and slope of y on x, with a normal prior of the slope about 1; where not stretched, it is 1."""
    if not stretched:
        return float((y - x).mean()), 1.0
    dx, dy = x - x.mean(), y - y.mean()
    noise = max(float(np.mean((dy - dx) ** 2)), 1e-12)
    precision = noise / STRETCH_SD**2
    slope = float((dx @ dy + precision) / (dx @ dx + precision))
    return float(y.mean() - slope * x.mean()), slope


def _of_classes(law: Tensor, truth: Tensor) -> SiteCalibration:
    logits = law.clamp(min=LEAST).log()

    def objective(x: Sequence[float]) -> float:
        shifted = (logits + torch.tensor(x[:-1], dtype=logits.dtype)) / math.exp(x[-1])
        prior = sum((v / OFFSET_SD) ** 2 for v in x[:-1]) / 2 + (x[-1] / LOG_SD) ** 2 / 2
        return float(F.cross_entropy(shifted, truth, reduction="sum")) + prior

    found = minimize(objective, np.zeros(logits.shape[1] + 1), method="Nelder-Mead", options={"maxiter": 4000}).x
    return SiteCalibration(tuple(float(v) for v in found[:-1]), 1.0, math.exp(float(found[-1])))
