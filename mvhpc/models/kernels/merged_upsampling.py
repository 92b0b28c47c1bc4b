"""Upsampling by two merged with the convolution that follows it, with less than a third of the products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpsampleConv(nn.Conv3d):
    """Nearest-neighbour upsampling by two, then a convolution of kernel 3 and padding 1.

    Of three neighbours along an axis, at least two are copies of one voxel: two weights multiply the same value. Adding
    these weights beforehand leaves two of three products per axis, 8 of 27 in all: a transposed convolution of
    stride 2 with the kernel (w2, w1 + w2, w0 + w1, w0) along each axis.
    """

    added: Tensor

    def __init__(
        self, inputs: int, outputs: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(inputs, outputs, 3, padding=1, device=device, dtype=dtype)
        rows = [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
        axis = torch.tensor(rows, device=device, dtype=dtype)
        self.register_buffer("added", torch.kron(axis, torch.kron(axis, axis)).T, persistent=False)  # (27, 64)

    @property
    def kernel(self) -> Tensor:
        """Kernel of the transposed convolution, (C, C', 4, 4, 4)."""
        added = self.weight.flatten(2) @ self.added  # (C', C, 64)
        return added.unflatten(2, (4, 4, 4)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w, d) to (B, C', 2h, 2w, 2d)."""
        with torch.autocast(x.device.type, enabled=False):  # adds the weights before rounding
            kernel = self.kernel
        if x.is_cuda:
            return convolve_octants(x, kernel, self.bias)
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)

    @torch.no_grad()
    def frozen(self) -> nn.ConvTranspose3d:
        """The equivalent transposed convolution with the present kernel, without gradients."""
        device, dtype = self.weight.device, self.weight.dtype
        convolution = nn.ConvTranspose3d(self.in_channels, self.out_channels, 4, 2, 1, device=device, dtype=dtype)
        convolution.weight.copy_(self.kernel)
        convolution.bias = self.bias
        return convolution.requires_grad_(False)


def convolve_octants(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """:class:`UpsampleConv`'s transposed convolution as a convolution of kernel 2 with eight outputs per voxel.

    cuDNN has no tensor-core kernels for the gradients of the transposed convolution with 64 weights per channel; its
    fallback takes 20 times as long.

    Args:
        x: (B, C, h, w, d).
        kernel: (C, C', 4, 4, 4).
        bias: (C',).

    Returns:
        (B, C', 2h, 2w, 2d), in channels-last order.
    """
    taps = kernel.to(x.dtype).flip(2, 3, 4).unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2))
    weight = taps.permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 3)  # (2 2 2 C', C, 2, 2, 2)
    bias = None if bias is None else bias.repeat(8)
    y = F.conv3d(x, weight, bias, padding=1)  # (B, 8 C', h + 1, w + 1, d + 1)
    y = y.permute(0, 2, 3, 4, 1).contiguous().unflatten(4, (2, 2, 2, -1))
    woven: Tensor = _Interleave.apply(y)
    return woven.permute(0, 4, 1, 2, 3)


class _Interleave(torch.autograd.Function):
    """y (B, h + 1, w + 1, d + 1, 2, 2, 2, C) to a volume (B, 2h, 2w, 2d, C): its voxel (2i + p, 2j + q, 2k + r) is
    y[:, i + p, j + q, k + r, p, q, r]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape = y.shape
        return _interleaved(y).flatten(5, 6).flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        dy = gradients[0].new_zeros(ctx.shape)
        woven = _interleaved(dy)
        woven.copy_(gradients[0].reshape(woven.shape))
        return dy


def _interleaved(y: Tensor) -> Tensor:
    """A view of contiguous y as (B, h, 2, w, 2, d, 2, C)."""
    (b, h, w, d), c, s = y.shape[:4], y.shape[7], y.stride()
    strides = (s[0], s[1], s[1] + s[4], s[2], s[2] + s[5], s[3], s[3] + s[6], s[7])
    return y.as_strided((b, h - 1, 2, w - 1, 2, d - 1, 2, c), strides)


def merge_upsampling(module: nn.Module) -> None:
    """Replace each upsampling of a MONAI network and the convolution after it by an :class:`UpsampleConv`, in place.

    Names, shapes and values of the weights stay the same; results change by rounding.
    """
    from monai.networks.blocks import UpSample  # MONAI takes seconds to import

    for part in [*module.modules()]:
        if isinstance(part, UpSample):
            old = part.postconv.conv
            new = UpsampleConv(old.in_channels, old.out_channels, old.weight.device, old.weight.dtype)
            new.weight, new.bias = old.weight, old.bias
            part.upsample_non_trainable, part.postconv.conv = nn.Identity(), new
