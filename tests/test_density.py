"""Predictive densities of numbers: closed forms and round trips."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Categorical, MixtureSameFamily, Normal

from mvhpc.diffusion.density import crps, density, quantile


def law(weights: list[float], means: list[float], sds: list[float]) -> MixtureSameFamily:
    w, m, s = (torch.tensor([x], dtype=torch.float64) for x in (weights, means, sds))
    return MixtureSameFamily(Categorical(w), Normal(m, s))


TWO = law([0.3, 0.7], [-1.0, 2.0], [0.5, 1.5])


def test_outputs_are_read_as_offsets_from_the_number_itself() -> None:
    one = density(torch.tensor([[1.5, 0.0, 0.0, math.log(0.2)]]))
    assert one.mean.item() == pytest.approx(1.5) and one.stddev.item() == pytest.approx(0.2)
    shifted = density(torch.tensor([[1.5, 5.0, 5.0, -1.0, 3.0, 0.0, 0.0]]))
    assert shifted.mean.item() == pytest.approx(1.5 + 1.0)


def test_predictions_of_ensemble_members_are_mixed_in_equal_parts() -> None:
    """However sure one of them is of itself."""
    output = torch.randn(5, 3, 1 + 3 * 2, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-4, 4, 9)[:, None]
    together, apart = density(output), [density(output[:, member]) for member in range(3)]
    torch.testing.assert_close(together.cdf(x), torch.stack([law.cdf(x) for law in apart]).mean(0))


def test_quantiles_invert_the_distribution_function() -> None:
    p = torch.tensor([1e-4, 0.05, 0.5, 0.95, 1 - 1e-4], dtype=torch.float64)
    assert TWO.cdf(quantile(TWO, p).T).T.flatten().tolist() == pytest.approx(p.tolist(), abs=1e-9)


@pytest.mark.parametrize("x", [-2.0, 0.4, 3.0])
def test_crps_is_the_integral_that_defines_it(x: float) -> None:
    def squared(y: float) -> float:
        return (float(TWO.cdf(torch.tensor([y], dtype=torch.float64))) - (y >= x)) ** 2

    integral = quad(squared, -20, x, limit=200)[0] + quad(squared, x, 20, limit=200)[0]
    assert crps(TWO, torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(integral, rel=1e-5)
