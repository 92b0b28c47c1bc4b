"""Mixtures, temperatures and stacking weights of predictive laws."""

import math

import pytest
import torch

from mvhpc.diffusion.laws import join, log_score, mix, normal, parts, stacking_weights, take, temper


def test_the_better_member_gets_the_weight() -> None:
    """Of a law that is the people's own and one that is off, nearly all weight goes to the first; of equals, half."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(500, 1, generator=g, dtype=torch.float64)
    zero, one = torch.zeros(500).double(), torch.ones(500).double()
    right, wrong = log_score(normal(zero, one), truth), log_score(normal(zero + 2, one), truth)
    assert stacking_weights(torch.stack([right, wrong], 1))[0] > 0.95
    assert stacking_weights(torch.stack([right, right], 1)) == pytest.approx([0.5, 0.5])


def test_weights_recover_a_mixture() -> None:
    """People of whom 70 % follow one law and the others another give these laws about these weights."""
    g = torch.Generator().manual_seed(1)
    n = 3000
    first = torch.rand(n, generator=g) < 0.7
    truth = (torch.randn(n, generator=g) + torch.where(first, -2.0, 2.0)).double()[:, None]
    one = torch.ones(n).double()
    scores = torch.stack([log_score(normal(centre * one, one), truth) for centre in (-2.0, 2.0)], 1)
    assert stacking_weights(scores)[0] == pytest.approx(0.7, abs=0.03)


def test_no_mixture_of_held_out_laws_is_more_probable() -> None:
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(200, 3, generator=g, dtype=torch.float64)

    def likelihood(weights: torch.Tensor) -> float:
        prior = weights.log().sum()  # one pseudo-count for each
        return float((scores.exp() @ weights).log().sum() + prior)

    best = torch.tensor(stacking_weights(scores)).double()
    others = torch.distributions.Dirichlet(torch.ones(3).double()).sample((200,))
    assert all(likelihood(best) >= likelihood(w) - 1e-6 for w in others)


def test_a_mixture_has_the_weighted_density_and_mean() -> None:
    mean, sd = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double()
    laws = [normal(mean, sd), normal(mean + 3, sd / 2)]
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0]]).double()
    mixed = mix(laws, weights)
    truth = torch.tensor([[0.5], [-1.0]]).double()
    expected = sum(w * log_score(law, truth).exp() for w, law in zip(weights.T, laws))
    assert torch.allclose(log_score(mixed, truth), expected.log())  # type: ignore[union-attr]
    assert torch.allclose(mixed.mean, (weights * torch.stack([law.mean for law in laws], 1)).sum(1))  # type: ignore[union-attr]
    p = [torch.tensor([[0.2, 0.8], [0.5, 0.5]]).double(), torch.tensor([[0.6, 0.4], [0.1, 0.9]]).double()]
    assert torch.allclose(mix(p, weights)[0], 0.3 * p[0][0] + 0.7 * p[1][0])  # type: ignore[index]


def test_a_temperature_keeps_means_and_orders_and_scales_widths() -> None:
    one = torch.ones(2).double()
    law = mix([normal(0 * one, one), normal(3 * one, one / 2)], torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double())
    wide = temper(law, 2.0)
    assert torch.allclose(wide.mean, law.mean)  # type: ignore[union-attr]
    assert torch.allclose(wide.stddev, 2 * law.stddev)  # type: ignore[union-attr]
    p = torch.tensor([[0.1, 0.2, 0.7]]).double()
    flat = temper(p, 3.0)
    assert isinstance(flat, torch.Tensor) and flat.argsort().tolist() == p.argsort().tolist()
    assert torch.allclose(temper(flat, 1 / 3), p)


def test_laws_of_groups_come_back_in_any_order() -> None:
    laws = [normal(torch.tensor([0.0, 1.0]).double(), torch.ones(2).double()), normal(*torch.ones(2, 1).double())]
    back = take(join(laws), torch.tensor([2, 0, 1]))
    assert parts(back)[1][:, 0].tolist() == [1, 0, 1]  # type: ignore[arg-type]
    assert math.isclose(float(back.stddev[0]), 1)  # type: ignore[union-attr]
