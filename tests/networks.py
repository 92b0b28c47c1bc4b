"""Small networks of the joint model for tests."""

from typing import Any

import torch
from torch import nn

from mvhpc import config
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.variables import Variables


def settings(design: str = "late", **changes: Any) -> config.DenoiserConfig:
    """Of a small network."""
    small: dict[str, Any] = {
        "scalars": design,
        "channels": [8, 16],
        "attention": [False, True],
        "res_blocks": 1,
        "head_channels": 8,
        "norm_groups": 4,
        "embedding": 16,
        "dropout": 0.0,
        "checkpointing": False,
    }
    return config.DenoiserConfig(**small | changes)


def perturb(network: nn.Module) -> None:
    """Leave nothing at its initial zeros, ready for inference."""
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.eval()


def perturbed(v: Variables, model: config.DenoiserConfig, masked_level: int | None = None) -> JointDenoiser:
    """A network with nothing at its initial zeros."""
    torch.manual_seed(0)
    network = JointDenoiser(v, model, masked_level)
    perturb(network)
    return network
