"""Predictive densities of numbers: mixtures of normal distributions.

The network's output for a number is a row (1 + 3M): the number, and for M components log weights, offsets of the means
from the first column, and logarithms of the SDs.
"""

import math

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.diffusion.laws import mixture

BISECTIONS = 40
LOG_SD = (-5.0, 2.0)  # limits, in the scale of z_0, where a variable has unit SD


def by_member(output: Tensor) -> Tensor:
    """Outputs for a scalar as (B, R, n), of R ensemble members; those of a single network may be (B, n)."""
    return output if output.ndim == 3 else output[:, None]


def density(output: Tensor) -> MixtureSameFamily:
    """p(x_0 | given) of a number, in the scale of z_0.

    Args:
        output: of the network, (B, 1 + 3M), or (B, R, 1 + 3M) of R ensemble members, whose densities are mixed in equal
            parts.
    """
    output = by_member(output).double()
    logits, offsets, logs = output[..., 1:].chunk(3, -1)  # each (B, R, M)
    logits, means, logs = (x.flatten(1) for x in (logits.log_softmax(-1), output[..., :1] + offsets, logs))  # (B, R M)
    return mixture(logits, means, logs.clamp(*LOG_SD).exp())


def quantile(law: MixtureSameFamily, p: Tensor) -> Tensor:
    """Quantiles (B, Q) of B mixtures at p, (B, Q) or (Q,), within (0, 1); by bisection."""
    reach = law.component_distribution.stddev.amax(1, keepdim=True) * 40
    middle = law.component_distribution.mean
    p = p.expand(len(middle), -1)
    low = (middle.amin(1, keepdim=True) - reach).expand_as(p)
    high = (middle.amax(1, keepdim=True) + reach).expand_as(p)
    for _ in range(BISECTIONS):
        half = (low + high) / 2
        below = p > law.cdf(half.T).T  # cdf takes (Q, B)
        low, high = torch.where(below, half, low), torch.where(below, high, half)
    return (low + high) / 2


def crps(law: MixtureSameFamily, x: Tensor) -> Tensor:
    """Continuous ranked probability score (B,) of values x (B,), in their scale: 0 for a certain and right prediction.

    Closed form for mixtures of normal distributions (Grimit et al. 2006, eq. 5).
    """
    weights, parts = law.mixture_distribution.probs, law.component_distribution  # (B, M)

    def expected(m: Tensor, variance: Tensor) -> Tensor:  # E|N(m, variance)|
        s = variance.sqrt()
        return s * math.sqrt(2 / math.pi) * (-0.5 * (m / s) ** 2).exp() + m * torch.erf(m / s / math.sqrt(2))

    error = expected(x[:, None] - parts.mean, parts.variance)
    m = parts.mean[:, :, None] - parts.mean[:, None, :]
    pairs = expected(m, parts.variance[:, :, None] + parts.variance[:, None, :])  # (B, M, M)
    return (weights * error).sum(1) - 0.5 * torch.einsum("bi,bj,bij->b", weights, weights, pairs)
