"""Doubling a volume and convolving it, as one transposed convolution with less than a third of the products."""

import torch
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from torch import Tensor, nn


class DoublingConv(nn.Conv3d):
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
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)

    @torch.no_grad()
    def settled(self) -> nn.ConvTranspose3d:
        """The same as it is now, with the kernel for its weights."""
        device, dtype = self.weight.device, self.weight.dtype
        convolution = nn.ConvTranspose3d(self.in_channels, self.out_channels, 4, 2, 1, device=device, dtype=dtype)
        convolution.weight.copy_(self.kernel)
        convolution.bias = self.bias
        return convolution.requires_grad_(False)


def merge_upsampling(module: nn.Module) -> None:
    """Make every doubling of a MONAI network, with the convolution behind it, a :class:`DoublingConv`.

    Names of weights, their shapes and values and, but for rounding, results stay.
    """
    for part in [*module.modules()]:
        if isinstance(part, UpSample):
            old = part.postconv.conv
            new = DoublingConv(old.in_channels, old.out_channels, old.weight.device, old.weight.dtype)
            new.weight, new.bias = old.weight, old.bias
            part.upsample_non_trainable, part.postconv.conv = nn.Identity(), new
