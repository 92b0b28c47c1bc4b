"""A U-Net of MONAI's blocks in the memory format that suits the device: channels last on GPUs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvhpc.models.kernels.normalization import GroupNorm


def use_channels_last_blocks(module: nn.Module) -> None:
    """Replace the classes of a network's MONAI blocks and norms by those of ``monai_blocks``, in place."""
    from mvhpc.models.kernels.monai_blocks import OURS  # MONAI takes seconds to import

    for part in module.modules():
        part.__class__ = OURS.get(type(part), type(part))


def channels_last_weights(module: nn.Module) -> None:
    """Convert the convolution weights of a network with these blocks to the channels-last format."""
    if any(isinstance(part, GroupNorm) for part in module.modules()):
        for parameter in module.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def down(block: Any, h: Tensor, time: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """A level of the down path: its output, and the skip connections for the up path."""
    passed = []
    for i, residual in enumerate(block.resnets):
        h = residual(h, time)
        if hasattr(block, "attentions"):
            h = _attend(block.attentions[i], h, context)
        passed.append(h)
    if block.downsampler is not None:
        h = block.downsampler(h, time)
        passed.append(h)
    return h, passed


def middle(block: Any, h: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    """The bottleneck."""
    return block.resnet_2(_attend(block.attention, block.resnet_1(h, time), context), time)


def up(block: Any, h: Tensor, passed: Sequence[Tensor], time: Tensor, context: Tensor | None) -> Tensor:
    """A level of the up path; it takes the skip connections ``passed`` from the last to the first."""
    for i, residual in enumerate(block.resnets):
        h = residual(torch.cat([h, passed[-1 - i]], 1), time)
        if hasattr(block, "attentions"):
            h = _attend(block.attentions[i], h, context)
    return h if block.upsampler is None else block.upsampler(h, time)


def _attend(attention: nn.Module, h: Tensor, context: Tensor | None) -> Tensor:
    h = attention(h, context) if hasattr(attention, "transformer_blocks") else attention(h)
    return h if h.is_cuda else h.contiguous()
