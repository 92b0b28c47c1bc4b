"""Doubling a volume and convolving it at once, with less than a third of the products."""

from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from torch import Tensor, nn


class UpsampleConv(nn.Conv3d):
    """Convolution, kernel 3 and padding 1, of a volume whose every voxel is first repeated twice along each axis.

    Of three neighbours at least two are then copies of one voxel, so that two of the kernel's weights meet the same
    value. Added beforehand, they leave two products an axis of three, 8 in all of 27: a transposed convolution of
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
        """Of the transposed convolution, (C, C', 4, 4, 4)."""
        added = self.weight.flatten(2) @ self.added  # (C', C, 64)
        return added.unflatten(2, (4, 4, 4)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w, d) to (B, C', 2h, 2w, 2d)."""
        with torch.autocast(x.device.type, enabled=False):  # weights are added before they are rounded
            kernel = self.kernel
        if x.is_cuda:
            return convolve_octants(x, kernel, self.bias)
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)

    @torch.no_grad()
    def frozen(self) -> nn.ConvTranspose3d:
        """The same as it is now, with the kernel for its weights."""
        device, dtype = self.weight.device, self.weight.dtype
        convolution = nn.ConvTranspose3d(self.in_channels, self.out_channels, 4, 2, 1, device=device, dtype=dtype)
        convolution.weight.copy_(self.kernel)
        convolution.bias = self.bias
        return convolution.requires_grad_(False)


def convolve_octants(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """:class:`UpsampleConv`'s transposed convolution as one of kernel 2 that says all eight voxels a voxel becomes.

    cuDNN's tensor-core kernels know no gradients of the other, whose 64 weights a channel are too many for them; what
    it takes instead lasts 20 times as long.

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
    """Of y (B, h + 1, w + 1, d + 1, 2, 2, 2, C) the doubled volume (B, 2h, 2w, 2d, C), whose voxel (2i + p, 2j + q,
    2k + r) is y's (i + p, j + q, k + r, p, q, r)."""

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
    """Make every doubling of a MONAI network, with the convolution behind it, a :class:`UpsampleConv`.

    Names of weights, their shapes and values and, but for rounding, results stay.
    """
    for part in [*module.modules()]:
        if isinstance(part, UpSample):
            old = part.postconv.conv
            new = UpsampleConv(old.in_channels, old.out_channels, old.weight.device, old.weight.dtype)
            new.weight, new.bias = old.weight, old.bias
            part.upsample_non_trainable, part.postconv.conv = nn.Identity(), new
