"""A network that is asked and no longer trained."""

import torch
from torch import nn

from mvhpc.models.upsample import DoublingConv


def freeze(network: nn.Module, precision: torch.dtype) -> None:
    """Do once what else every call does with the weights alone: round them, and add up those of doublings.

    Answers stay the same to the bit, under an autocast to ``precision``, without which the network is of no more use.
    Autocast remembers what it rounded for the sake of gradients alone, and never under ``torch.inference_mode``.

    Args:
        network: with weights of float32.
        precision: that matrix products are done in.
    """
    for parent in [*network.modules()]:
        for name, part in parent.named_children():
            if isinstance(part, DoublingConv):
                setattr(parent, name, part.settled())
    for part in network.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            part.to(precision)
