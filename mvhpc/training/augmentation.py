"""Random changes of volumes in training: small affine movements, mirroring, intensity and noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvhpc.runtime.devices import send
from mvhpc.runtime.randomness import rand, randn


@dataclass
class AugmentationConfig:
    """How much volumes are changed; 0 switches a change off."""

    rotation: float  # SD of the angle about each axis, degrees
    scale: float  # SD of the logarithm of the size along each axis
    shift: float  # SD along each axis, voxels
    flip: float  # probability of mirroring left and right
    intensity: float  # SD of the logarithm of the exponent and of the factor of each channel
    noise: float  # SD, of intensities in [0, 1]


def augment(x: Tensor, config: AugmentationConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Changed volumes (B, C, h, w, d) in [0, 1]; what is done to row b is drawn from ``generators[b]``.

    Args:
        x: volumes in [0, 1]; the first axis of space runs from left to right.
        config: how much.
        generators: B of them.
    """
    draws = randn(generators, (9 + 2 * x.shape[1],))  # (B, 9 + 2 C)
    matrix = _matrices(draws[:, :9], config, x.shape[2:])
    matrix[:, :, 0] *= torch.where(rand(generators) < config.flip, -1.0, 1.0)[:, None]
    grid = F.affine_grid(send(_reversed(matrix), x.device), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    gain = send((config.intensity * draws[:, 9:]).exp(), x.device).reshape(len(x), 2, -1, 1, 1, 1)
    x = gain[:, 0] * x.clamp(min=0).pow(gain[:, 1])
    if config.noise:
        x = x + config.noise * randn(generators, x.shape[1:], x.device)
    return x


def _matrices(draws: Tensor, config: AugmentationConfig, size: torch.Size) -> Tensor:
    """From an axis-ordered output position to the input's, (B, 3, 4), in half sizes of the volume."""
    angles = draws[:, :3] * math.radians(config.rotation)
    matrix = torch.eye(3).expand(len(draws), 3, 3)
    for axis in range(3):
        turn = torch.eye(3).repeat(len(draws), 1, 1)
        a, b = [i for i in range(3) if i != axis]
        cos, sin = angles[:, axis].cos(), angles[:, axis].sin()
        turn[:, a, a], turn[:, a, b], turn[:, b, a], turn[:, b, b] = cos, -sin, sin, cos
        matrix = matrix @ turn
    half = torch.tensor(size).float() / 2  # the box is no cube: turns are rotations in voxels
    matrix = matrix * (config.scale * draws[:, 3:6]).exp()[:, None] * half / half[:, None]
    return torch.cat([matrix, (config.shift * draws[:, 6:9] / half)[:, :, None]], 2)


def _reversed(matrix: Tensor) -> Tensor:
    """The same map with the axes in the opposite order, as ``affine_grid`` takes them."""
    return torch.cat([matrix[:, :, :3].flip(1, 2), matrix[:, :, 3:].flip(1)], 2)
