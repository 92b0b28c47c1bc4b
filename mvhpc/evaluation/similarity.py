"""Similarity of two volumes, in float32 also under autocast, whose bfloat16 has three digits."""

from collections.abc import Sequence

import torch
from torch import Tensor


def psnr(x: Tensor, y: Tensor, inside: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of volumes (B, 1, H, W, D) in [0, 1].

    Args:
        x, y: the volumes.
        inside: the voxels that count, bool (B, 1, H, W, D). None: all, background included.
    """
    return -10 * torch.log10(_mean((x - y).square(), inside))


def ssim(x: Tensor, y: Tensor, inside: Tensor | None = None) -> Tensor:
    """Structural similarity (B,) of volumes (B, 1, H, W, D) in [0, 1] (Wang et al. 2004, in 3D).

    Gaussian window of SD 1.5 voxels and width 11, or the largest odd one that fits; where it fits whole.

    Args:
        x, y: the volumes.
        inside: the windows that count, by their centres, bool (B, 1, H, W, D). None: all, background included.
    """
    from monai.metrics.regression import compute_ssim_and_cs  # MONAI takes seconds to import

    width = min(11, *((n - 1) // 2 * 2 + 1 for n in x.shape[2:]))
    with torch.autocast(x.device.type, enabled=False):
        similarity, _ = compute_ssim_and_cs(
            x.float(), y.float(), spatial_dims=3, kernel_size=[width] * 3, kernel_sigma=[1.5] * 3, data_range=1.0
        )
    edge = width // 2
    if inside is not None and edge:
        inside = inside[:, :, edge:-edge, edge:-edge, edge:-edge]
    return _mean(similarity, inside)


SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM, the finest first (Wang et al. 2003)


def scales(shape: Sequence[int], width: int = 11) -> int:
    """At how many scales, each half of the one before, a window of ``width`` voxels fits; at most five."""
    return max((k for k in range(1, len(SCALES) + 1) if min(shape) >> (k - 1) >= width), default=1)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity (B,) of volumes (B, 1, H, W, D) in [0, 1] (Wang et al. 2003, in 3D).

    Window as in :func:`ssim`; at as many scales as fit, their weights scaled to sum to 1.
    """
    from monai.metrics.regression import compute_ms_ssim  # MONAI takes seconds to import

    width = min(11, *((n - 1) // 2 * 2 + 1 for n in x.shape[2:]))
    weights = SCALES[: scales(x.shape[2:], width)]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    with torch.autocast(x.device.type, enabled=False):
        return compute_ms_ssim(
            x.float(), y.float(), spatial_dims=3, kernel_size=[width] * 3, kernel_sigma=1.5, weights=shares
        )[:, 0]


def _mean(values: Tensor, inside: Tensor | None) -> Tensor:
    """(B, ...) to the mean of each sample (B,), NaN where nothing is inside."""
    if inside is None:
        return values.flatten(1).mean(1)
    return values.where(inside, torch.nan).flatten(1).nanmean(1)
