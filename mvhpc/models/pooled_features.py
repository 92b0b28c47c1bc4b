"""What the linear predictions read: pooled volumes, smoothed, and folded at the middle of the head.

Left and right are averaged, as the features of the two halves are nearly copies and their differences mostly noise.
Tissue maps are compositions, taken as centred log-ratios (Aitchison 1982); a volume by itself as its voxels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.05  # added to shares of tissue before the logarithm


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
        logs = (x.clamp(min=0) + LEAST).log()
        x = logs - logs.mean(1, keepdim=True)
    return x.flatten(1)
