"""Networks for inference: weights rounded and packed once instead of in every call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from mvhpc.models.kernels.cpu_conv3d import ONEDNN
from mvhpc.models.kernels.merged_upsampling import UpsampleConv


def freeze(network: nn.Module, precision: torch.dtype) -> None:
    """Round the weights and merge those of upsamplings, in place, which every call would do otherwise.

    Afterwards the network must run under an autocast to ``precision``. Results stay the same to the bit; on GPUs they
    change by rounding, since upsampling in training is computed differently. Autocast caches rounded weights only when
    they need gradients, and never under ``torch.inference_mode``.

    Args:
        network: with float32 weights.
        precision: of matrix products.
    """
    for parent in [*network.modules()]:
        for name, part in parent.named_children():
            if isinstance(part, UpsampleConv):
                setattr(parent, name, part.frozen())
    for part in network.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            part.to(precision)


def pack(network: nn.Module) -> None:
    """Convert the convolution weights of a frozen network, in bfloat16 on a CPU, to oneDNN's layout, in place.

    Otherwise every call converts them, which with AMX takes longer than the products of eight small volumes, and seven
    times as long as those of one. Results stay the same to the bit; ``torch.compile`` can no longer trace the network.
    """
    if not (ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in [*network.modules()]:
        for name, part in parent.named_children():
            if type(part) is nn.Conv3d and part.weight.is_cpu and part.weight.dtype is torch.bfloat16:
                setattr(parent, name, PackedConv(part))


class PackedConv(nn.Module):
    """A bfloat16 convolution with weights in oneDNN's layout, by the operators that PyTorch's compiler uses."""

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
    """FLOPs of that operator, which PyTorch's counter does not know."""
    count: int = conv_flop_count(x, weight, out_shape)
    return count
