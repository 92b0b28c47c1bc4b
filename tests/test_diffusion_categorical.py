"""Laws of categorical diffusion, against the K x K matrices that the closed form does without."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mvhpc.diffusion.categorical import Uniform, draw, probabilities
from mvhpc.diffusion.schedules import cosine

T = 1000
UNIFORM = Uniform(cosine(T))
CLASSES = [2, 3, 7]


def transitions(k: int, s: int, t: int) -> torch.Tensor:
    """Q_{s+1} ... Q_t of the paper's eq. 4, multiplied out; rows x_s, columns x_t."""
    product = torch.eye(k, dtype=torch.float64)
    for level in range(s + 1, t + 1):
        beta = 1 - UNIFORM.abar[level] / UNIFORM.abar[level - 1]
        product = product @ ((1 - beta) * torch.eye(k, dtype=torch.float64) + beta / k)
    return product


def some_law(k: int, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64).pow(2).softmax(-1)


def posterior(prior: torch.Tensor, t: int) -> torch.Tensor:
    """The exact p(x_0 | x_t) under ``prior`` (1, K), for each x_t: (K, K)."""
    k = prior.shape[-1]
    joint = prior * UNIFORM.marginal(torch.eye(k), t).T  # rows x_t, columns x_0
    return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize("k", CLASSES)
def test_marginal_is_the_product_of_transitions(k: int) -> None:
    for t in (0, 1, 37, 1000):
        torch.testing.assert_close(UNIFORM.marginal(torch.eye(k), t), transitions(k, 0, t), atol=1e-12, rtol=0)
    torch.testing.assert_close(UNIFORM.marginal(torch.eye(k), T), torch.full((k, k), 1 / k).double())


@pytest.mark.parametrize("k", CLASSES)
def test_posterior_is_bayes_rule_on_the_matrices(k: int) -> None:
    for t, s in [(1, 0), (2, 1), (500, 480), (1000, 1), (1000, 999)]:
        q_s, q_ts = transitions(k, 0, s), transitions(k, s, t)
        for x0 in range(k):
            exact = q_s[x0] * q_ts.T  # rows x_t, columns x_s: q(x_s | x_0) q(x_t | x_s)
            exact = exact / exact.sum(-1, keepdim=True)
            ours = UNIFORM.reverse(F.one_hot(torch.full((k,), x0), k), torch.arange(k), t, s)
            torch.testing.assert_close(ours, exact, atol=1e-10, rtol=0)


def test_reverse_step_sums_to_one_at_a_level_per_row() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.randint(1, T + 1, (500,), generator=g)
    s = (t * torch.rand(500, generator=g)).long()
    p0 = torch.rand(500, 4, generator=g).mul(5).softmax(-1)
    p = UNIFORM.reverse(p0, torch.randint(4, (500,), generator=g), t, s)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(500).double(), atol=1e-6, rtol=0)


def test_last_step_is_the_prediction_itself() -> None:
    p0 = some_law(5, rows=5)
    for t in (1, 20, 1000):
        torch.testing.assert_close(UNIFORM.reverse(p0, torch.arange(5), t, 0), p0, atol=1e-10, rtol=0)


@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("stride", [1, 20, 37, 250, 1000])
def test_any_stride_gives_the_same_law(k: int, stride: int) -> None:
    """Exact, by composing the reverse transitions: from uniform at T to the data's law, through every marginal."""
    prior = some_law(k)
    law = torch.full((1, k), 1 / k, dtype=torch.float64)
    grid = [*range(T, 0, -stride), 0]
    for t, s in pairwise(grid):
        law = law @ UNIFORM.reverse(posterior(prior, t), torch.arange(k), t, s)
        torch.testing.assert_close(law, UNIFORM.marginal(prior, s), atol=1e-10, rtol=0)
    torch.testing.assert_close(law, prior, atol=1e-10, rtol=0)


def test_draws_follow_their_law() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    n = 100_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    share = draw(p.expand(n, 4), uniform).bincount(minlength=4) / n
    assert share[1] == 0
    torch.testing.assert_close(share, p, atol=5 * 0.5 / n**0.5, rtol=0)
    assert draw(torch.eye(4), torch.zeros(4)).tolist() == [0, 1, 2, 3]
    assert draw(torch.eye(4), torch.full((4,), 1 - 2**-24)).tolist() == [0, 1, 2, 3]


def test_probabilities_are_averaged_over_members() -> None:
    """And are computed on the device of the logits."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[1.0, 3.0], [3.0, 1.0]]])  # (B, R, K)
    even = torch.tensor([0.5, 0.5]).double()
    assert torch.equal(probabilities(logits[:, 0]), logits[:, 0].double().softmax(1))
    torch.testing.assert_close(probabilities(logits)[0], (torch.tensor([2.0, 0.0]).double().softmax(0) + even) / 2)
    torch.testing.assert_close(probabilities(logits)[1], even)
    assert probabilities(logits.to("meta")).device.type == "meta"


def test_noise_keeps_a_class_as_often_as_the_schedule_says() -> None:
    n, k, t = 100_000, 3, 400
    x_t = UNIFORM.add_noise(
        torch.ones(n, dtype=torch.long), t, k, torch.rand(n, generator=torch.Generator().manual_seed(0))
    )
    keep = UNIFORM.abar[t].item()
    assert (x_t == 1).double().mean().item() == pytest.approx(keep + (1 - keep) / k, abs=5 * 0.5 / n**0.5)
