"""Predictive laws of scalars: their scores, mixtures and calibration.

A law of a number is a mixture of normal distributions in the scale of z_0, that of a category its probabilities (B, K).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

Law = MixtureSameFamily | Tensor
ITERATIONS = 300
LEAST = 1e-30  # probability density of what a law rules out


def mixture(log_weights: Tensor, means: Tensor, sds: Tensor) -> MixtureSameFamily:
    """B mixtures of M normal distributions, each argument (B, M)."""
    # Validation would make the host wait for the accelerator.
    part = Normal(means, sds, validate_args=False)
    return MixtureSameFamily(Categorical(logits=log_weights, validate_args=False), part, validate_args=False)


def normal(mean: Tensor, sd: Tensor) -> MixtureSameFamily:
    """B normal distributions of means and SDs (B,)."""
    return mixture(torch.zeros_like(mean)[:, None], mean[:, None], sd[:, None])


def parts(law: MixtureSameFamily) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and SDs of the components, each (B, M)."""
    component = law.component_distribution
    return law.mixture_distribution.logits.log_softmax(-1), component.mean, component.stddev


def join(laws: Sequence[Law]) -> Law:
    """The laws of one group of people after another's."""
    if isinstance(laws[0], Tensor):
        return torch.cat([law for law in laws if isinstance(law, Tensor)])
    columns = zip(*(parts(law) for law in laws if not isinstance(law, Tensor)))
    return mixture(*(torch.cat(column) for column in columns))


def take(law: Law, rows: Tensor) -> Law:
    """The laws of the people at ``rows``."""
    return law[rows] if isinstance(law, Tensor) else mixture(*(x[rows] for x in parts(law)))


def log_score(law: Law, truth: Tensor) -> Tensor:
    """Logarithm (B,) of the density or probability of the truth: z_0 (B, 1), or classes (B,)."""
    if isinstance(law, Tensor):
        return law.gather(1, truth[:, None])[:, 0].clamp(min=LEAST).log()
    return law.log_prob(truth[:, 0].double()).clamp(min=math.log(LEAST))


def mix(laws: Sequence[Law], weights: Tensor) -> Law:
    """The mixture of M laws of the same scalar and B people, of weights (B, M)."""
    if isinstance(laws[0], Tensor):
        return torch.stack([law * w[:, None] for law, w in zip(laws, weights.T)]).sum(0)
    logs = weights.clamp(min=LEAST).log()
    columns = [(own + log[:, None], means, sds) for law, log in zip(laws, logs.T) for own, means, sds in [parts(law)]]  # type: ignore[arg-type]
    return mixture(*(torch.cat(column, 1) for column in zip(*columns)))


def temper(law: Law, temperature: Tensor | float) -> Law:
    """A law stretched about its mean; of a category p ** (1 / temperature), normalised (Guo et al. 2017).

    Args:
        law: of B people.
        temperature: above 0, a number or (B, 1).
    """
    if isinstance(law, Tensor):
        return (law.clamp(min=LEAST).log() / temperature).softmax(1)
    logs, means, sds = parts(law)
    middle = law.mean[:, None]
    return mixture(logs, middle + temperature * (means - middle), temperature * sds)


def stacking_weights(scores: Tensor, prior: float = 1.0) -> list[float]:
    """The weights of a mixture of M laws that make held-out people most probable (Yao et al. 2018, stacking).

    Args:
        scores: log scores of N people by each law, (N, M); nobody is scored by a law that was fitted to them.
        prior: pseudo-counts for each law, which keep weights of few people near to equal ones.

    Returns:
        M numbers that sum to 1.
    """
    relative = (scores - scores.amax(1, keepdim=True)).double().exp()  # (N, M)
    weights = torch.full((scores.shape[1],), 1 / scores.shape[1], dtype=torch.float64)
    for _ in range(ITERATIONS):  # expectation maximisation; the objective is concave
        shares = relative * weights
        counts = (shares / shares.sum(1, keepdim=True)).sum(0) + prior
        weights = counts / counts.sum()
    found: list[float] = weights.tolist()
    return found
