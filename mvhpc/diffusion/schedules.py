"""Noise schedules: the share of signal left at each level t = 0 (clean) ... T (noise)."""

import math

import torch
from torch import Tensor


def scaled_linear(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Signal share of Gaussian diffusion with betas linear in square-root space (Rombach et al. 2022; MAISI).

    Args:
        steps: T.
        beta_start: beta_1.
        beta_end: beta_T.

    Returns:
        abar (T + 1,) float64, abar[0] = 1, falling.
    """
    beta = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64) ** 2  # (T,)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])  # (T + 1,)


def cosine(steps: int, offset: float = 0.008) -> Tensor:
    """Signal share of categorical diffusion by the cosine schedule (Nichol and Dhariwal 2021, eq. 17).

    The last beta is left at 1, not clipped: level T is uniform noise and nothing else.

    Args:
        steps: T.
        offset: the schedule's s.

    Returns:
        abar (T + 1,) float64, abar[0] = 1, falling, abar[T] = 0.
    """
    angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset) * math.pi / 2
    abar = torch.cos(angle) ** 2 / math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    abar[0], abar[-1] = 1.0, 0.0  # as the formula has it, without its rounding errors
    return abar
