"""How wide intervals must be to hold as many people as they say, whatever the cause of the errors.

Split-conformal prediction: of N people whom the model was not fitted to, the interval is stretched until it holds the
ceil((N + 1) * level)-th nearest (Lei et al. 2018, section 2.2).
"""

import math

import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.diffusion.density import quantile

LEVEL = 0.9  # of the central interval whose coverage is set
FEWEST = 10  # people; the conformal interval of fewer is not finite


def needed_stretch(law: MixtureSameFamily, error: Tensor) -> Tensor:
    """How far each law must be stretched about its mean for its central 90 % interval to reach an error.

    Args:
        law: of B people.
        error: truth less the law's mean, (B,), in the law's scale.

    Returns:
        (B,), at least 0; 1 for an error at an end of the interval as it is.
    """
    ends = quantile(law, torch.tensor([0.5 - LEVEL / 2, 0.5 + LEVEL / 2], dtype=torch.float64))  # (B, 2)
    low, high = (ends - law.mean[:, None]).unbind(1)
    return torch.where(error < 0, error / low, error / high)


def conformal_temperature(stretches: Tensor) -> float:
    """The temperature by which the central 90 % interval holds 90 % of further people.

    Args:
        stretches: of N people by :func:`needed_stretch`, (N,), N at least ``FEWEST``.
    """
    place = math.ceil((len(stretches) + 1) * LEVEL)  # at most N, from ten people on
    return float(stretches.sort().values[place - 1])
