"""Networks whose features compare sets of volumes: of slices, by published weights, or of volumes, by a baseline.

Features of slices are 2.5D as in MAISI (arXiv:2409.11169): the middle slices of each axis, each alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvhpc.config import ConfigError
from mvhpc.models.bundle import BaselineModel, load
from mvhpc.models.loading import prepare
from mvhpc.models.perceptual import BACKBONE_SHA256, squeezenet, squeezenet_layers
from mvhpc.models.resnet50 import ResNet50
from mvhpc.models.weight_files import WeightsError, read_weight_file
from mvhpc.variables import Continuous

PLANES = ("axial", "coronal", "sagittal")  # slices across axis 2, 1 and 0 of a volume (H, W, D)
BATCH = 32  # slices at a time
REMEDY = """\
--features takes the run folder of `mvhpc train baseline want=age given=image`, which needs no download, or a file:
  squeezenet1_1-b8a52dc0.pth      https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth
  RadImageNet-ResNet50_notop.pth  https://github.com/Warvito/radimagenet-models, with its hash as features_sha256=HASH,
                                  as whoever you have the file from states it"""


class FeatureNetwork(Protocol):
    """A network whose features are compared.

    Attributes:
        planes: names of the planes that its features are of.
        name: of the distance of its features.
        recipe: JSON-able: network, weights, and how a volume is shown to it.
    """

    planes: tuple[str, ...]
    name: str
    recipe: dict[str, Any]

    def __call__(self, volumes: Tensor) -> list[Tensor]:
        """Features of each plane, (B, S, F) float32 on the CPU, of volumes (B, H, W, D) in [0, 1]."""


@dataclass(frozen=True)
class Published:
    """A network that is published with weights.

    Attributes:
        name: for people.
        first: a weight that no other one has, which tells it in a file.
        build: makes the network, of (N, 3, h, w) to (N, F, ., .).
        layers: its weights among those of the file.
        mean, sd: of the three channels, subtracted and divided by.
        sha256: of the file; empty where the user has to state it.
    """

    name: str
    first: str
    build: Callable[[], nn.Module]
    layers: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    mean: tuple[float, float, float]
    sd: tuple[float, float, float]
    sha256: str


PUBLISHED = (
    Published(
        "SqueezeNet 1.1, ImageNet",
        "features.3.squeeze.weight",
        squeezenet,
        squeezenet_layers,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        BACKBONE_SHA256,
    ),
    Published(
        "ResNet50, RadImageNet",
        "layer4.2.conv3.weight",
        ResNet50,
        dict,
        (0.406, 0.456, 0.485),  # channels in the order blue, green, red, as in MAISI
        (1.0, 1.0, 1.0),
        "",
    ),
)


class SliceFeatures:
    """Features of single slices, averaged over the image.

    Args:
        path: of the weights.
        sha256: of the file; where it is empty, that of the SqueezeNet file.
        share: of the slices across each axis, those in the middle.
        pixels: side of the square that a slice is shown in: padded with background, then resampled. 0: as it is.
        device: to compute on.

    Raises:
        WeightsError: no such file, another hash, or another network.
    """

    planes: tuple[str, ...] = PLANES
    name = "FID"

    def __init__(self, path: str, sha256: str, share: float, pixels: int, device: torch.device | str) -> None:
        sha256 = sha256.lower() or BACKBONE_SHA256
        state = read_weight_file(path, "features", sha256, REMEDY)
        found = next((p for p in PUBLISHED if p.first in state), None)
        if found is None:
            raise WeightsError(f"features={path}: neither SqueezeNet 1.1 nor RadImageNet's ResNet50.\n{REMEDY}")
        self.network, self.share, self.pixels, self.device = found.build(), share, pixels, device
        try:
            self.network.load_state_dict(dict(found.layers(state)))
        except RuntimeError as error:
            raise WeightsError(f"features={path}: not the weights of {found.name}: {error}\n{REMEDY}") from error
        prepare(self.network, device)
        self.mean, self.sd = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (found.mean, found.sd))
        self.recipe = {
            "network": found.name,
            "weights_sha256": sha256,
            "planes": list(PLANES),
            "slices": f"the middle {share:g} of each axis, each alone",
            "padding": "background, to a square of the volume's longest side" if pixels else "none",
            "pixels": pixels or "as the volume's",
            "intensity": "[0, 1] as packed, not rescaled by slice",
            "normalisation": {"mean": list(found.mean), "sd": list(found.sd)},
        }

    @torch.inference_mode()
    def __call__(self, volumes: Tensor) -> list[Tensor]:
        """See :class:`FeatureNetwork`."""
        return [self._plane(volumes, axis) for axis in (3, 2, 1)]

    def _plane(self, volumes: Tensor, axis: int) -> Tensor:
        side = volumes.shape[axis]
        start, end = (int((1 + sign * self.share) / 2 * side) for sign in (-1, 1))  # as in MAISI
        images = volumes.narrow(axis, start, max(1, end - start)).movedim(axis, 1).flatten(0, 1)[:, None]
        found = torch.cat([self._features(part.to(self.device)) for part in images.split(BATCH)])  # (B S, F)
        return found.view(len(volumes), -1, found.shape[1])

    def _features(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.pixels:
            h, w = x.shape[2:]
            side = max(h, w)
            top, left = (side - h) // 2, (side - w) // 2
            x = F.pad(x, [left, side - w - left, top, side - h - top])
            x = F.interpolate(x, (self.pixels, self.pixels), mode="bilinear", antialias=True)
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.sd
        found: Tensor = self.network(x).mean((2, 3)).float().cpu()  # (N, F)
        return found


class VolumeFeatures:
    """Features of volumes: what the last linear layer of a baseline reads.

    Args:
        path: run folder of a baseline that reads one volume and nothing else.
        volume: name of that volume.
        device: to compute on.

    Attributes:
        model: the baseline.
        reader: kind of its network.

    Raises:
        ConfigError: a baseline that reads something else.
        ModelError: no baseline there.
    """

    planes: tuple[str, ...] = ("volume",)
    name = "in-domain FID"

    def __init__(self, path: str, volume: str, device: torch.device | str) -> None:
        self.model = load(path, device, kind=BaselineModel)
        if self.model.given != [volume]:
            raise ConfigError(
                f"features={path}: this baseline reads {', '.join(self.model.given)}; features are of {volume} alone: "
                f"mvhpc train baseline want={self.model.want} given=[{volume}]"
            )
        self.last = [m for m in self.model.network.modules() if isinstance(m, nn.Linear)][-1]
        self.device = device
        self.reader = type(self.model.network.network).__name__
        self.recipe = {
            "network": f"{self.reader} of these data, {self.model.want} given {volume}",
            "planes": ["the volume"],
            "layer": "what the last linear layer reads",
            "padding": "none",
            "intensity": "[0, 1] as packed",
        }

    @torch.inference_mode()
    def __call__(self, volumes: Tensor) -> list[Tensor]:
        """See :class:`FeatureNetwork`; P and S are 1."""
        found: list[Tensor] = []
        hook = self.last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            for volume in volumes.split(4):
                self.model.network(volume[:, None].float().to(self.device), {}, {})
        finally:
            hook.remove()
        return [torch.cat(found).float().cpu()[:, None]]  # (B, 1, F)

    @torch.inference_mode()
    def read(self, features: NDArray[np.float32]) -> list[float | str]:
        """The scalar that the baseline predicts from its features (N, F): numbers in their unit, or classes."""
        output = self.last(torch.from_numpy(features).to(self.device)).double().cpu()
        wanted = self.model.scalars[self.model.want]
        if isinstance(wanted, Continuous):
            return list(wanted.decode(output).tolist())
        return list(wanted.decode(output.argmax(1)))


def feature_network(
    path: str, sha256: str, share: float, pixels: int, volume: str, device: torch.device | str
) -> FeatureNetwork:
    """The network of a weights file, or of the run folder of a baseline; arguments as those of the classes."""
    if Path(path).is_dir():
        return VolumeFeatures(path, volume, device)
    return SliceFeatures(path, sha256, share, pixels, device)
