"""Doubling a volume and convolving it, as one transposed convolution with less than a third of the products."""

import torch
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from torch import Tensor, nn


class DoublingConv(nn.Conv3d):
    """Convolution, kernel 3 and padding 1, of a volume whose every voxel is first repeated twice along each axis.

    Of three neighbours at least two are then copies of one voxel, so that two of the kernel's weights meet the same
    value. Added beforehand, they leave two products an axis of three, 8 in all of 27: a transposed convolution of
    stride 2 with the kernel (w2, w1 + w2, w0 + w1, w0).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w, d) to (B, C', 2h, 2w, 2d)."""
        kernel = self.weight.transpose(0, 1)  # (C, C', 3, 3, 3)
        for axis in (2, 3, 4):
            first, middle, last = kernel.unbind(axis)
            kernel = torch.stack([last, middle + last, first + middle, first], axis)
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)  # the kernel is (C, C', 4, 4, 4)


def merge_upsampling(module: nn.Module) -> None:
    """Make every doubling of a MONAI network, with the convolution behind it, a :class:`DoublingConv`.

    Names of weights, their shapes and, but for rounding, results stay.
    """
    for part in module.modules():
        if isinstance(part, UpSample):
            part.upsample_non_trainable = nn.Identity()
            part.postconv.conv.__class__ = DoublingConv
