"""Networks made ready for inference."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import nn

from mvhpc.models.kernels.channels_last import channels_last_weights
from mvhpc.models.kernels.cpu_conv3d import patch_conv3d
from mvhpc.models.model_folder import read_weights


def prepare(network: nn.Module, device: torch.device | str) -> None:
    """Make a network ready for inference: on its device, in evaluation mode, without gradients."""
    network.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        patch_conv3d(network)
    else:
        channels_last_weights(network)


def load_weights(network: nn.Module, folder: Path, meta: dict[str, Any], name: str, device: torch.device | str) -> None:
    """Give a network its weights of a model folder, and make it ready for inference.

    Raises:
        ModelError: a missing or damaged file.
    """
    network.load_state_dict(from_bytes(read_weights(folder, meta, name)))
    prepare(network, device)
