"""A network that is asked and no longer trained."""

import torch
from torch import nn

from mvhpc.models.upsample import DoublingConv


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
            if isinstance(part, DoublingConv):
                setattr(parent, name, part.settled())
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.Linear) and not name.startswith(spared):
            part.to(precision)
