"""What the linear predictions read: pooled volumes, smoothed, and folded at the middle of the head.

Left and right are averaged, as the features of the two halves are nearly copies and their differences mostly noise. Of
tissue maps the square roots are taken, whose noise is about equal everywhere, less the mean of each tissue over the
scan's brain, in which scanners differ most.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth(x: Tensor, sd: float) -> Tensor:
    """Volumes (B, C, h, w, d) blurred by a normal distribution of ``sd`` voxels; zeros lie beyond the edges."""
    if sd <= 0:
        return x
    radius = math.ceil(3 * sd)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sd) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    for axis in (2, 3, 4):
        rows = x.movedim(axis, -1)
        blurred = F.conv1d(rows.reshape(-1, 1, rows.shape[-1]), kernel[None, None], padding=radius)
        x = blurred.reshape(rows.shape).movedim(-1, axis)
    return x


def linear_features(pooled: Tensor, sd: float) -> Tensor:
    """Features of pooled volumes.

    Args:
        pooled: (B, C, h, w, d) in [0, 1], C tissue maps or one volume; the first axis of space runs from left to right.
        sd: of the smoothing, voxels.

    Returns:
        (B, C * ceil(h / 2) * w * d) float32.
    """
    x = smooth(pooled.float(), sd)
    x = (x + x.flip(2))[:, :, : (x.shape[2] + 1) // 2] / 2
    if x.shape[1] > 1:
        brain = x.sum(1, keepdim=True).clamp(0, 1)  # (B, 1, h / 2, w, d)
        roots = x.clamp(min=0).sqrt()
        space = (2, 3, 4)
        mean = (roots * brain).sum(space, keepdim=True) / brain.sum(space, keepdim=True).clamp(min=1e-6)
        x = (roots - mean) * brain
    return x.flatten(1)
