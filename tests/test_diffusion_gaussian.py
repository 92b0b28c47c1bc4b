"""Laws of Gaussian diffusion: conversions invert each other, levels compose, DDIM follows the exact flow."""

from itertools import pairwise

import pytest
import torch

from mvhpc.diffusion.gaussian import TARGETS, Gaussian
from mvhpc.diffusion.schedules import scaled_linear

T = 1000
GAUSSIAN = Gaussian(scaled_linear(T, 0.0015, 0.0195))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_schedule_is_the_product_of_its_betas() -> None:
    abar = GAUSSIAN.abar
    beta = 1 - abar[1:] / abar[:-1]
    assert abar[0] == 1
    assert len(abar) == T + 1
    assert beta[0].item() == pytest.approx(0.0015)
    assert beta[-1].item() == pytest.approx(0.0195)
    root = beta.sqrt()  # linear in square-root space
    torch.testing.assert_close(root.diff(), (root[-1] - root[0]).expand(T - 1) / (T - 1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", TARGETS)
def test_conversions_invert(kind: str) -> None:
    z0, eps = normal(5, 3, 2), normal(5, 3, 2, seed=1)
    t = torch.tensor([1, 20, 333, 999, 1000])
    z_t = GAUSSIAN.add_noise(z0, t, eps)
    x0 = GAUSSIAN.x0(GAUSSIAN.target(z0, eps, t, kind), z_t, t, kind)
    torch.testing.assert_close(x0, z0, atol=1e-10, rtol=0)
    torch.testing.assert_close(GAUSSIAN.eps(x0, z_t, t), eps, atol=1e-10, rtol=0)


def test_clean_level_says_its_own_origin() -> None:
    z0, eps = normal(4, 2), normal(4, 2, seed=1)
    for kind in ("eps", "v"):
        assert torch.equal(GAUSSIAN.add_noise(z0, 0, eps), z0)
        torch.testing.assert_close(GAUSSIAN.x0(normal(4, 2, seed=2), z0, 0, kind), z0)


def test_forward_levels_compose() -> None:
    """q(z_t | z_0) is q(z_s | z_0) followed by the kernel from s to t."""
    for s, t in [(0, 1), (10, 11), (100, 700), (999, 1000)]:
        a_s, a_t = GAUSSIAN.abar[s], GAUSSIAN.abar[t]
        keep = a_t / a_s
        assert (keep * (1 - a_s) + 1 - keep).item() == pytest.approx((1 - a_t).item(), abs=1e-12)
    z0 = normal(200_000)
    z_t = GAUSSIAN.add_noise(z0, 400, normal(200_000, seed=1))  # unit variance stays unit variance
    assert z_t.std().item() == pytest.approx(1.0, abs=0.01)


def chain(z: torch.Tensor, mean: float, sd: float, steps: int) -> torch.Tensor:
    """DDIM under the exact denoiser of N(mean, sd^2)."""
    grid = torch.linspace(T, 0, steps + 1).round().long().tolist()
    for t, s in pairwise(grid):
        a = GAUSSIAN.abar[t].sqrt()
        gain = a * sd**2 / (a**2 * sd**2 + 1 - a**2)
        z = GAUSSIAN.ddim_step(z, mean + gain * (z - a * mean), t, s)
    return z


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_lands_on_a_point_mass(steps: int) -> None:
    torch.testing.assert_close(
        chain(normal(100), 0.3, 0.0, steps), torch.full((100,), 0.3, dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("mean, sd", [(0.3, 0.25), (-0.5, 1.0), (0.0, 2.0)])
def test_ddim_converges_to_the_exact_flow_of_a_gaussian(mean: float, sd: float) -> None:
    """The probability flow of a Gaussian is affine: it carries z_T's deviation over in proportion to the SDs."""
    z = normal(100)
    a = GAUSSIAN.abar[T].sqrt()
    exact = mean + sd * (z - a * mean) / (a**2 * sd**2 + 1 - a**2).sqrt()
    errors = [(chain(z, mean, sd, steps) - exact).norm() / (exact - mean).norm() for steps in (250, 500, 1000)]
    assert errors[-1] < 0.025
    for coarse, fine in pairwise(errors):  # first order in the step
        assert 1.7 < coarse / fine < 2.3
