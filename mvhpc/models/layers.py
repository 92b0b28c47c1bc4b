"""What the networks of the joint model share: their inputs, and the embeddings of levels and scalars."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.variables import Categorical, Scalar, Variables

Values = Mapping[str, Tensor]


class VariableNetwork(nn.Module):
    """A network over the noisy values z and the levels t of all variables.

    Args:
        variables: at least one volume; all volumes of one spatial size.
        embedding: width of the embeddings of levels and scalars.
        masked_level: the level from which a value is pure noise and masked by zero. None: no value is masked.

    Raises:
        ValueError: no volume, or volumes of different size.
    """

    def __init__(self, variables: Variables, embedding: int, masked_level: int | None) -> None:
        super().__init__()
        self.volumes, self.scalars, self.names = variables.volumes, variables.scalars, variables.names
        if not self.volumes:
            raise ValueError("the joint model needs at least one volume variable; the schema has none")
        sizes = {v.name: v.shape[1:] for v in self.volumes}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"volumes of one model must have latents of one size, not {sizes}")
        self.channels = sum(v.shape[0] for v in self.volumes)
        self.masked_level, self.embedding = masked_level, embedding

    def image(self, z: Values, t: Values) -> Tensor:
        """All volumes as channels, masked ones as zeros: (B, sum C, h, w, d)."""
        image = torch.cat([z[v.name] * self.visible(v.name, t, 5) for v in self.volumes], 1)
        return image.contiguous(memory_format=torch.channels_last_3d) if image.is_cuda else image

    def visible(self, name: str, t: Values, dimensions: int) -> Tensor:
        """1 where a value is not masked, else 0; (B, 1, ...)."""
        seen = torch.ones_like(t[name]) if self.masked_level is None else t[name] < self.masked_level
        return seen.float().reshape(-1, *[1] * (dimensions - 1))

    def levels(self, names: Iterable[str], t: Values) -> list[Tensor]:
        """Sinusoids of levels, (B, E) each."""
        return [sinusoid(t[name], self.embedding) for name in names]

    def embed_scalars(self, tokens: nn.ModuleList, z: Values, t: Values) -> list[Tensor]:
        """A token (B, E) of each scalar."""
        return [
            token(z[v.name], sinusoid(t[v.name], self.embedding), self.visible(v.name, t, 2))
            for v, token in zip(self.scalars, tokens, strict=True)
        ]


class Token(nn.Module):
    """A scalar as one token: the sum of embeddings of its value, its level and its name."""

    def __init__(self, variable: Scalar, width: int) -> None:
        super().__init__()
        classes = variable.size if isinstance(variable, Categorical) else 0
        self.value = nn.Embedding(classes, width) if classes else nn.Linear(1, width)
        self.level = nn.Linear(width, width)  # its bias is the embedding of the name

    def forward(self, z: Tensor, level: Tensor, visible: Tensor) -> Tensor:
        """
        Args:
            z: value (B, 1), or class (B,).
            level: sinusoid of its level, (B, E).
            visible: 1, or 0 where the value is masked, (B, 1).

        Returns:
            (B, E).
        """
        return self.value(z) * visible + self.level(level)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Embedding (B, width) of levels t (B,) by sines and cosines of periods up to 10,000 (Ho et al. 2020)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * rates
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose output is zero before training: for logits, even odds."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
