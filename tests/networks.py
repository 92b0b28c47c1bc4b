"""Small networks of the joint model for tests."""

from typing import Any

import torch
from torch import nn

from mvhpc import config
from mvhpc.models.joint_network import JointNetwork, build_networks
from mvhpc.models.scalar_predictor import ScalarPredictor
from mvhpc.variables import Variables


def settings(design: str = "late", members: int = 1, **changes: Any) -> config.DenoiserConfig:
    """Of a small network."""
    small: dict[str, Any] = {
        "scalars": design,
        "components": 2 if design == "late" else 0,
        "ensemble_members": members,
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


def joint(networks: dict[str, nn.Module]) -> JointNetwork:
    """Both networks as one function."""
    both: dict[str, Any] = dict(networks)
    return JointNetwork(**both)


def perturbed(v: Variables, model: config.DenoiserConfig, masked_level: int | None = None) -> JointNetwork:
    """Networks with nothing at their initial zeros."""
    torch.manual_seed(0)
    networks = build_networks(v, model, masked_level)
    for network in networks.values():
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        network.eval()
    return joint(networks)


def parts(net: JointNetwork) -> list[nn.Module]:
    """The networks of it."""
    return [net.denoiser] if net.scalars is None else [net.denoiser, net.scalars]


def predictor(net: JointNetwork) -> ScalarPredictor:
    """The network of scalars."""
    assert net.scalars is not None
    return net.scalars
