"""A network that is asked and no longer trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from mvhpc.models.kernels.cpu_conv3d import ONEDNN
from mvhpc.models.kernels.merged_upsampling import UpsampleConv


def freeze(network: nn.Module, precision: torch.dtype, spared: tuple[str, ...] = ()) -> None:
    """Do once what else every call does with the weights alone: round them, and add up those of doublings.

    Answers stay the same to the bit (on GPUs to rounding, where doublings that are trained go another way), under an
    autocast to ``precision``, without which the network is of no more use.
    Autocast remembers what it rounded for the sake of gradients alone, and never under ``torch.inference_mode``.

    Args:
        network: with weights of float32.
        precision: that matrix products are done in.
        spared: how the names of parts begin that are also run without autocast, and whose weights are not rounded.
    """
    for parent in [*network.modules()]:
        for name, part in parent.named_children():
            if isinstance(part, UpsampleConv):
                setattr(parent, name, part.frozen())
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.Linear) and not name.startswith(spared):
            part.to(precision)


def pack(network: nn.Module) -> None:
    """Put the weights of a frozen network's convolutions, of those in bfloat16 on a CPU, in oneDNN's order.

    Else every call puts them there, which with AMX takes longer than the products of eight small volumes, and seven
    times as long as those of one. Answers stay the same to the bit; ``torch.compile`` can no longer read the network.
    """
    if not (ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in [*network.modules()]:
        for name, part in parent.named_children():
            if type(part) is nn.Conv3d and part.weight.is_cpu and part.weight.dtype is torch.bfloat16:
                setattr(parent, name, PackedConv(part))


class PackedConv(nn.Module):
    """A convolution in bfloat16, its weights in oneDNN's order, by the operators to which PyTorch's compiler takes."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        c = convolution
        self.how = [c.padding, c.stride, c.dilation, c.groups]
        weight = torch.ops.mkldnn._reorder_convolution_weight(c.weight, *self.how, [])
        self.register_buffer("weight", weight, persistent=False)
        self.bias = c.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, D) to (B, C', ...) in bfloat16."""
        x = x.to(torch.bfloat16)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.how, "none", [], "")
        return y.contiguous()


@register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
def _products(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """What PyTorch's counter does not know of that operator, from shapes."""
    count: int = conv_flop_count(x, weight, out_shape)
    return count
