"""Intervals that hold as many people as they say."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mvhpc.diffusion.density import quantile
from mvhpc.diffusion.laws import mix, normal, temper
from mvhpc.models.conformal import LEVEL, conformal_temperature, needed_stretch
from mvhpc.training.stacking import _temperature

ENDS = torch.tensor([0.05, 0.95], dtype=torch.float64)


def held(law: object, truth: Tensor) -> int:
    low, high = quantile(law, ENDS).T  # type: ignore[arg-type]
    return int(((low - 1e-9 <= truth) & (truth <= high + 1e-9)).sum())


@pytest.mark.parametrize("people", [10, 19, 57, 200])
def test_the_stretched_interval_holds_the_conformal_number_of_people(people: int) -> None:
    """Of skewed laws too, whose intervals are longer on one side."""
    g = torch.Generator().manual_seed(people)
    mean = torch.randn(people, generator=g, dtype=torch.float64)
    law = mix(
        [normal(mean, 0.2 + 0 * mean), normal(mean + 2, 1 + 0 * mean)], torch.tensor([[0.7, 0.3]]).expand(people, -1)
    )
    truth = law.mean + 3 * torch.randn(people, generator=g, dtype=torch.float64)
    temperature = conformal_temperature(needed_stretch(law, truth - law.mean))
    assert held(temper(law, temperature), truth) == math.ceil((people + 1) * LEVEL)
    assert held(temper(law, temperature * (1 - 1e-6)), truth) == math.ceil((people + 1) * LEVEL) - 1


@pytest.mark.parametrize("heavy", [False, True])
def test_further_people_are_held_whatever_the_errors_are(heavy: bool) -> None:
    """The mean over many sets of 40 people is 90 % and at most 1 / 41 more, also of errors with heavy tails."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        errors = torch.from_numpy(rng.standard_t(3, 90) if heavy else rng.normal(size=90))
        law = normal(0 * errors, 0.3 + 0 * errors)
        temperature = _temperature([normal(law.mean[:40], law.stddev[:40])], errors[:40, None])
        covered.append(held(temper(normal(law.mean[40:], law.stddev[40:]), temperature), errors[40:]) / 50)
    assert 0.89 < np.mean(covered) < 0.935


def test_nine_people_change_nothing() -> None:
    law = normal(torch.zeros(9).double(), torch.ones(9).double())
    assert _temperature([law], torch.full((9, 1), 5.0)) == 1
