"""Perceptual distance of volumes: LPIPS on SqueezeNet 1.1 features of slices, from local weight files.

Zhang et al. 2018 (arXiv:1801.03924), version 0.1, squeeze; on slices of three axes as in MAISI (arXiv:2409.11169).
Compute nodes have no internet access, so nothing is downloaded: the configuration names the two files, and their
SHA-256 is checked.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvhpc.models.weight_files import read_weight_file

BACKBONE_SHA256 = "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b"
HEADS_SHA256 = "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"

HOW_TO_GET = f"""\
The perceptual term needs two weight files; download them once and set:
  loss.backbone  squeezenet1_1-b8a52dc0.pth  https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth
                 SHA-256 {BACKBONE_SHA256}
  loss.heads     squeeze.pth                 lpips/weights/v0.1/squeeze.pth inside https://pypi.org/project/lpips/0.1.4/
                 (also https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/squeeze.pth)
                 SHA-256 {HEADS_SHA256}
Or train without the term: loss.perceptual=0"""

SQUEEZE = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
SQUEEZE |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
TAPS = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}  # layer -> number of channels that are compared
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS 0.1: ImageNet's statistics for [-1, 1]
SMALLEST = 17  # pixels; a smaller input is empty after the third pooling


class Fire(nn.Module):
    """SqueezeNet's block: a 1x1 squeeze, then 1x1 and 3x3 expansions in parallel (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def squeezenet() -> nn.Sequential:
    """Convolutions of SqueezeNet 1.1, numbered as torchvision's ``features``: (N, 3, h, w) to (N, 512, ., .)."""
    layers: dict[int, nn.Module] = {0: nn.Conv2d(3, 64, 3, stride=2), 1: nn.ReLU()}
    layers |= {n: nn.MaxPool2d(3, stride=2, ceil_mode=True) for n in (2, 5, 8)}
    layers |= {n: Fire(*sizes) for n, sizes in SQUEEZE.items()}
    return nn.Sequential(*(layers[n] for n in sorted(layers)))


def squeezenet_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of :func:`squeezenet` in the file of torchvision's SqueezeNet 1.1."""
    prefix = "features."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class SqueezeLPIPS(nn.Module):
    """LPIPS of images: weighted squared differences of unit-normalised features, averaged over space.

    ``features`` numbers its layers as torchvision does; ``heads`` are lpips' ``linN``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = squeezenet()
        self.heads = nn.ParameterList([torch.zeros(1, c, 1, 1) for c in TAPS.values()])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def _features(self, x: Tensor) -> list[Tensor]:
        found = []
        x = (x - self.shift) / self.scale  # (N, 3, h, w)
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in TAPS:
                norm = torch.sqrt(x.square().sum(1, keepdim=True) + 1e-10)  # inside: finite gradient at zero
                found.append(x / norm)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) of images (N, 1 or 3, h, w)."""
        distance = torch.zeros(a.shape[0], device=a.device)
        for head, f, g in zip(self.heads, self._features(a), self._features(b), strict=True):
            distance = distance + ((f - g).square() * head).sum(1).mean((1, 2))
        return distance


def slice_distance(lpips: SqueezeLPIPS, a: Tensor, b: Tensor, share: float, draws: Sequence[torch.Generator]) -> Tensor:
    """2.5D perceptual distance: the mean LPIPS over some slices of each axis, summed over the three axes.

    As in MAISI (MONAI's ``PerceptualLoss(is_fake_3d=True)``), slices are passed on as they are: grey, in [0, 1].

    Args:
        lpips: the network.
        a: volumes (B, 1, H, W, D); b: the same shape.
        share: fraction of the slices along each axis; at least one is taken. MAISI: 0.2.
        draws: one generator per sample, which selects its slices.

    Returns:
        (B,), zero for equal volumes.

    Raises:
        ValueError: a slice is smaller than 17 pixels, too small for the network.
    """
    if min(a.shape[2:]) < SMALLEST:
        raise ValueError(
            f"volumes of {tuple(a.shape[2:])} voxels are too small for the perceptual term, which needs "
            f"{SMALLEST} per axis; set loss.perceptual=0"
        )
    a, b = a.float(), b.float()
    total = torch.zeros(a.shape[0], device=a.device)
    for axis in (1, 2, 3):  # of (1, H, W, D)
        count = max(1, round(share * a.shape[axis + 1]))
        chosen = [torch.randperm(a.shape[axis + 1], generator=g)[:count].to(a.device) for g in draws]
        x, y = (
            torch.cat([v.index_select(axis, n).movedim(axis, 0) for v, n in zip(volumes, chosen, strict=True)])
            for volumes in (a, b)
        )  # (B * count, 1, ., .)
        total = total + lpips(x, y).view(-1, count).mean(1)
    return total


def load_lpips(
    backbone: str, heads: str, backbone_sha256: str = BACKBONE_SHA256, heads_sha256: str = HEADS_SHA256
) -> SqueezeLPIPS:
    """LPIPS-squeeze, frozen, from local files.

    Args:
        backbone: SqueezeNet 1.1 in torchvision's layout (``squeezenet1_1-b8a52dc0.pth``).
        heads: the linear heads of lpips 0.1 (``squeeze.pth``).
        backbone_sha256, heads_sha256: expected hashes.

    Raises:
        WeightsError: a file is missing or has another hash; the message says how to get it or train without it.
    """
    network = SqueezeLPIPS()
    features = read_weight_file(backbone, "loss.backbone", backbone_sha256, HOW_TO_GET)
    network.features.load_state_dict(squeezenet_layers(features))
    weights = read_weight_file(heads, "loss.heads", heads_sha256, HOW_TO_GET)
    for n, head in enumerate(network.heads):
        head.data.copy_(weights[f"lin{n}.model.1.weight"])
    return network.eval().requires_grad_(False)
