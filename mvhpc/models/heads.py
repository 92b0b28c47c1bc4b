"""What the joint model says of scalars: the paper's heads, and the trunk that takes their place in the late design."""

import math

import torch
from torch import Tensor, nn

from mvhpc import config
from mvhpc.variables import Categorical, Scalar


class Token(nn.Module):
    """A scalar as one token: its value, its level and its name, each embedded."""

    def __init__(self, variable: Scalar, width: int) -> None:
        super().__init__()
        self.classes = variable.size if isinstance(variable, Categorical) else 0
        self.value = nn.Embedding(self.classes, width) if self.classes else nn.Linear(1, width)
        self.level = nn.Linear(width, width)  # its bias is the embedding of the name

    def forward(self, z: Tensor, wave: Tensor, shown: Tensor) -> Tensor:
        """Value (B, 1) or class (B,), sinusoid of its level (B, E), and 1 or 0 (B, 1) by whether the value is shown, to
        the token (B, E)."""
        return self.value(z) * shown + self.level(wave)


class PaperHead(nn.Module):
    """Section 3.1 of the paper: two GroupNorm-SiLU-Conv blocks with a skip, global average pooling, a linear layer."""

    def __init__(self, variable: Scalar, model: config.DenoiserConfig) -> None:
        super().__init__()
        width = model.channels[-1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.GroupNorm(model.norm_groups, width), nn.SiLU(), nn.Conv3d(width, width, 3, padding=1))
                for _ in range(2)
            )
        )
        self.out = _silent(width, variable.size if isinstance(variable, Categorical) else 1)

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Features (B, C, h, w, d) to (B, 1), or logits (B, K)."""
        pooled = (bottleneck + self.blocks(bottleneck)).mean((2, 3, 4))  # (B, C)
        return self.out(pooled)


class Reader(nn.Module):
    """What the trunk knows of the volumes: a few convolutions, averaged over each octant.

    It sees the latents standardised by channel, where equal tissue is one number in all places, so that it can measure
    how much there is of what, and roughly where. Standardised element by element, as the U-Net has them, it is another
    number in each.

    Args:
        channels: of the latents of all volumes.
        model: widths.
    """

    def __init__(self, channels: int, model: config.DenoiserConfig) -> None:
        super().__init__()
        widths = [channels, *model.channels, model.channels[-1]]
        strides = [1, *[2] * (len(model.channels) - 1), 1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv3d(i, o, 3, stride, padding=1), nn.GroupNorm(model.norm_groups, o), nn.SiLU())
                for i, o, stride in zip(widths, widths[1:], strides)
            )
        )
        self.out = nn.Linear(8 * widths[-1], widths[-1])

    @torch.no_grad()
    def adapt(self, latents: Tensor) -> None:
        """Start with features of mean 0 and SD 1 over these people, (N, channels, h, w, d).

        What tells people apart is a hundredth of such an average; left as it is, it is learnt late.
        """
        features = _octants(self.blocks(latents))  # (N, 8 C)
        self.out.weight.div_(features.std(0).clamp(min=1e-3))
        self.out.bias.sub_(self.out.weight @ features.mean(0))

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w, d), standardised by channel, to (B, model.channels[-1])."""
        return self.out(_octants(self.blocks(latents)))


def _octants(x: Tensor) -> Tensor:
    """(B, C, h, w, d) to its means over both halves of each axis, (B, 8 C); `AdaptiveAvgPool3d(2)`, whose gradient is
    not the same twice on GPUs."""
    for _ in range(3):
        n = x.shape[2]
        x = torch.stack([x[:, :, : (n + 1) // 2].mean(2), x[:, :, n // 2 :].mean(2)], -1)
    return x.flatten(1)


class Trunk(nn.Module):
    """What is said of each scalar, from what the reader saw of the volumes and the tokens and levels of everything.

    The tokens scale and shift that, which else goes linearly to the output; a layer that is not linear adds what
    the rest lacks.

    Args:
        scalars: in the schema's order.
        variables: how many there are, volumes included.
        model: widths.
    """

    def __init__(self, scalars: list[Scalar], variables: int, model: config.DenoiserConfig) -> None:
        super().__init__()
        width, told = model.channels[-1], 2 * model.embedding
        self.told = nn.Sequential(
            nn.Linear(variables * model.embedding, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU()
        )
        self.modulate = nn.ModuleList(nn.Linear(told, 2 * width) for _ in scalars)
        self.bend = nn.ModuleList(
            nn.Sequential(nn.Linear(width, told), nn.SiLU(), nn.Linear(told, width)) for _ in scalars
        )
        self.out = nn.ModuleList(
            _silent(width, v.size) if isinstance(v, Categorical) else _density(width, model.components) for v in scalars
        )

    def forward(self, scalar: int, seen: Tensor, told: Tensor) -> Tensor:
        """
        Args:
            scalar: which, by its place among the scalars.
            seen: of the volumes, (B, C).
            told: what ``self.told`` makes of all tokens of scalars and levels of volumes, (B, variables x E).

        Returns:
            Logits (B, K), or (B, 1 + 3 components).
        """
        scale, shift = self.modulate[scalar](told).chunk(2, 1)  # each (B, C)
        x = seen * (1 + scale) + shift
        return self.out[scalar](x + self.bend[scalar](x))


def _silent(width: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as "nothing known": zero, or even odds."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _density(width: int, components: int) -> nn.Linear:
    """As :func:`_silent`, with the parameters of a broad density (:mod:`mvhpc.diffusion.density`)."""
    layer = _silent(width, 1 + 3 * components)
    if components:
        with torch.no_grad():
            layer.bias[1 + components : 1 + 2 * components] = torch.linspace(-1.5, 1.5, components)
            layer.bias[1 + 2 * components :] = math.log(0.6)
    return layer
