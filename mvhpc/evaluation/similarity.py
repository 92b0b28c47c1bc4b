"""Similarity of two volumes."""

import torch
from torch import Tensor


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of volumes (B, 1, H, W, D) in [0, 1], background included."""
    return -10 * torch.log10((x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (B,) of volumes (B, 1, H, W, D) in [0, 1] (Wang et al. 2004, in 3D).

    Gaussian window of SD 1.5 voxels and width 11, or the largest odd one that fits.
    """
    from monai.metrics.regression import compute_ssim_and_cs  # MONAI takes seconds to import

    width = min(11, *((n - 1) // 2 * 2 + 1 for n in x.shape[2:]))
    similarity, _ = compute_ssim_and_cs(
        x, y, spatial_dims=3, kernel_size=[width] * 3, kernel_sigma=[1.5] * 3, data_range=1.0
    )
    return similarity.flatten(1).mean(1)
