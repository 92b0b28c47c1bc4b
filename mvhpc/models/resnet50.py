"""ResNet50 in 2D (He et al. 2016) as Keras has it, whose weights RadImageNet published.

It differs from torchvision's: the first convolution of a block has the stride, convolutions have biases, and the batch
normalisation adds 1.001e-5. Names of the weights are those of the file that MAISI and MONAI use
(github.com/Warvito/radimagenet-models).
"""

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1.001e-5
BLOCKS = {64: (3, 1), 128: (4, 2), 256: (6, 2), 512: (3, 2)}  # width -> number of blocks, stride of the first
EXPANSION = 4


class Bottleneck(nn.Module):
    """A residual block (N, inputs, h, w) to (N, 4 width, h / stride, w / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, stride), nn.BatchNorm2d(width, EPS)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, EPS)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1), nn.BatchNorm2d(outputs, EPS)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs, EPS))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Images (N, 3, h, w) to features (N, 2048, h / 32, w / 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3), nn.BatchNorm2d(64, EPS)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for i, (width, (blocks, stride)) in enumerate(BLOCKS.items(), 1):
            layer = [Bottleneck(inputs, width, stride)]
            inputs = EXPANSION * width
            layer += [Bottleneck(inputs, width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", nn.Sequential(*layer))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, len(BLOCKS) + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return x
