"""Predictive densities of numbers: mixtures of normal distributions.

What the network says of a number is a row (1 + 3M): its v or x_0 (whichever the diffusion asks for) and, of M
components, log weights, offsets of the means from what the first says of x_0, and logarithms of the SDs.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

BISECTIONS = 40
LOG_SD = (-5.0, 2.0)  # limits, in the scale of z_0, where a variable has unit SD


def by_member(output: Tensor) -> Tensor:
    """What is said of a scalar, (B, R, n), R readers apart; of a single one it may come as (B, n)."""
    return output if output.ndim == 3 else output[:, None]


def density(output: Tensor, kind: str = "v", temperature: Tensor | float = 1.0) -> MixtureSameFamily:
    """p(x_0 | given) of a number that is at t = T, from the network's output (B, 1 + 3M); in the scale of z_0.

    Of R readers, (B, R, 1 + 3M), the densities are mixed in equal parts. ``kind`` is what the first column is, v (-x_0
    at t = T) or x0. ``temperature``, a number or (B, 1), stretches the density about its mean.
    """
    said = by_member(output).double()
    centre = said[..., :1] * (1 if kind == "x0" else -1)
    logits, offsets, logs = said[..., 1:].chunk(3, -1)  # each (B, R, M)
    logits, means, logs = (x.flatten(1) for x in (logits.log_softmax(-1), centre + offsets, logs))  # each (B, R M)
    middle = (logits.softmax(1) * means).sum(1, keepdim=True)
    means = middle + temperature * (means - middle)
    # Unchecked: checks would have the host wait for the accelerator.
    part = Normal(means, temperature * logs.clamp(*LOG_SD).exp(), validate_args=False)
    return MixtureSameFamily(Categorical(logits=logits, validate_args=False), part, validate_args=False)


def quantile(law: MixtureSameFamily, p: Tensor) -> Tensor:
    """Values (B, Q) below which shares p (B, Q) or (Q,), strictly between 0 and 1, of the mass lie; by bisection."""
    spread = law.component_distribution.stddev.amax(1, keepdim=True) * 40
    middle = law.component_distribution.mean
    p = p.expand(len(middle), -1)
    low = (middle.amin(1, keepdim=True) - spread).expand_as(p)
    high = (middle.amax(1, keepdim=True) + spread).expand_as(p)
    for _ in range(BISECTIONS):
        half = (low + high) / 2
        below = p > law.cdf(half.T).T  # cdf takes (Q, B)
        low, high = torch.where(below, half, low), torch.where(below, high, half)
    return (low + high) / 2


def crps(law: MixtureSameFamily, x: Tensor) -> Tensor:
    """Continuous ranked probability score (B,) of values x (B,), in their scale: 0 is a certain and right answer.

    Closed form for mixtures of normal distributions (Grimit et al. 2006, eq. 5).
    """
    weights, parts = law.mixture_distribution.probs, law.component_distribution  # (B, M)

    def expected(m: Tensor, variance: Tensor) -> Tensor:  # E|N(m, variance)|
        s = variance.sqrt()
        return s * math.sqrt(2 / math.pi) * (-0.5 * (m / s) ** 2).exp() + m * torch.erf(m / s / math.sqrt(2))

    off = expected(x[:, None] - parts.mean, parts.variance)
    m = parts.mean[:, :, None] - parts.mean[:, None, :]
    apart = expected(m, parts.variance[:, :, None] + parts.variance[:, None, :])  # (B, M, M)
    return (weights * off).sum(1) - 0.5 * torch.einsum("bi,bj,bij->b", weights, weights, apart)
