"""Networks that predict scalars from pooled volumes: an ensemble of 3D encoders.

Each member encodes the volumes once; its heads then predict any scalar from these features and from the values and
levels of the other scalars. Several members are trained by cross-fitting (:mod:`mvhpc.training.cross_fitting`).
"""

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.models.layers import Token, Values, VariableNetwork, zero_linear
from mvhpc.variables import Categorical, Scalar, Variables

LEAST_SD = 1e-3  # that a channel is divided by


class Widths(Protocol):
    """The configuration of the networks."""

    channels: list[int]
    embedding: int
    components: int
    ensemble_members: int


class ScalarPredictor(VariableNetwork):
    """Predictions of every scalar by each of R ensemble members: logits of a category, a density of a number.

    Args:
        variables: at least one volume and one scalar; all volumes of one spatial size.
        model: widths, and the number of members.
        masked_level: the level from which a value is pure noise and masked by zero. None: no value is masked.

    Raises:
        ValueError: no volume, or volumes of different size.
    """

    def __init__(self, variables: Variables, model: Widths, masked_level: int | None = None) -> None:
        super().__init__(variables, model.embedding, masked_level)
        self.components = model.components
        members = range(model.ensemble_members)
        self.encoders = nn.ModuleList(Encoder(self.channels, model) for _ in members)
        self.tokens = nn.ModuleList(nn.ModuleList(Token(v, model.embedding) for v in self.scalars) for _ in members)
        self.heads = nn.ModuleList(ScalarHeads(self.scalars, len(variables), model) for _ in members)

    def forward(self, z: Values, t: Values, want: Collection[str] | None = None) -> dict[str, Tensor]:
        """
        Args:
            z: volumes (B, C, h, w, d), standardised by channel; numbers (B x Q, 1) and categories int64 (B x Q,), row
                by row, for Q queries about each volume.
            t: levels, int64 (B,) of volumes and (B x Q,) of scalars.
            want: scalars to predict; other names are ignored. None: all.

        Returns:
            By scalar, as :meth:`predict`.
        """
        n = len(z[self.scalars[0].name]) // len(z[self.volumes[0].name])  # Q
        features = self.encode(z, t).repeat_interleave(n, 0)
        volumes = {v.name for v in self.volumes}
        levels = {name: x.repeat_interleave(n) if name in volumes else x for name, x in t.items()}
        return self.predict(features, z, levels, self.names if want is None else want)

    def encode(self, z: Values, t: Values) -> Tensor:
        """Features (B, R, C) of the volumes; zero where all of them are masked."""
        visible = torch.stack([self.visible(v.name, t, 3) for v in self.volumes]).amax(0)  # (B, 1, 1)
        image = self.image(z, t)  # (B, sum C, h, w, d)
        return torch.stack([encoder(image) for encoder in self.encoders], 1) * visible

    def predict(self, features: Tensor, z: Values, t: Values, want: Collection[str]) -> dict[str, Tensor]:
        """The scalars among ``want``.

        Args:
            features: from :meth:`encode`, each row repeated for its queries.
            z: values of the scalars.
            t: levels of all variables, (B x Q,) as the features have rows.
            want: names; those of volumes are ignored.

        Returns:
            By scalar, logits (B x Q, R, K) or parameters (B x Q, R, 1 + 3 components) of
            :func:`mvhpc.diffusion.density.density`.
        """
        levels = self.levels((v.name for v in self.volumes), t)
        predictions: dict[str, list[Tensor]] = {v.name: [] for v in self.scalars if v.name in want}
        for heads, tokens, x in zip(self.heads, self.tokens, features.unbind(1), strict=True):
            assert isinstance(heads, ScalarHeads) and isinstance(tokens, nn.ModuleList)
            conditioning = heads.conditioning(torch.cat([*self.embed_scalars(tokens, z, t), *levels], 1))
            for i, v in enumerate(self.scalars):
                if v.name in want:
                    predictions[v.name].append(heads(i, x, conditioning))
        return {name: torch.stack(members, 1) for name, members in predictions.items()}

    def standardize_features(self, z: Values) -> None:
        """Before training: scale each encoder's layers by volumes (N, C, h, w, d) of some people."""
        image = self.image(z, {name: torch.zeros(len(x)) for name, x in z.items()})
        for encoder in self.encoders:
            assert isinstance(encoder, Encoder)
            encoder.standardize(image)


class Encoder(nn.Module):
    """Features of the volumes: convolutions, all but the last with max pooling, averaged over the volume; cf. SFCN
    (Peng et al. 2021).

    It takes volumes standardised by channel: equal tissue is one number everywhere. Nothing is normalised within a
    volume, which would take away how much there is of which tissue.

    Args:
        channels: of all volumes.
        model: widths.
    """

    def __init__(self, channels: int, model: Widths) -> None:
        super().__init__()
        *widths, last = [channels, *model.channels]
        parts: list[nn.Module] = []
        for i, o in pairwise(widths):
            parts += [FixedNorm(i), nn.Conv3d(i, o, 3, padding=1), Halve(), nn.ReLU()]
        self.convolutions = nn.Sequential(*parts, FixedNorm(widths[-1]), nn.Conv3d(widths[-1], last, 1), nn.ReLU())
        self.out = nn.Sequential(FixedNorm(last), nn.Linear(last, last))

    @torch.no_grad()
    def standardize(self, x: Tensor) -> None:
        """Before training: standardise the inputs of every layer over volumes (N, channels, h, w, d)."""
        _fit_norms(self.out, _fit_norms(self.convolutions, x).mean((2, 3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (B, channels, h, w, d), standardised by channel, to (B, model.channels[-1])."""
        return self.out(self.convolutions(x).mean((2, 3, 4)))


class FixedNorm(nn.Module):
    """Standardisation of each channel by a mean and an SD that training does not change: frozen batch normalisation.

    Averages over a volume differ little between people. Changes of the weights of activations whose mean is not zero
    shift everybody's averages by more than they differ, and the encoder learns late or never.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("sd", torch.ones(channels))

    def fit(self, x: Tensor) -> None:
        """Take mean and SD of x (N, channels, ...)."""
        others = [0, *range(2, x.ndim)]
        self.mean.copy_(x.mean(others))
        self.sd.copy_(x.std(others).clamp(min=LEAST_SD))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, ...) to the same."""
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.mean.reshape(shape)) / self.sd.reshape(shape)


def _fit_norms(parts: nn.Sequential, x: Tensor) -> Tensor:
    """Fit the norms among some layers to their inputs in turn; the layers' output."""
    for part in parts:
        if isinstance(part, FixedNorm):
            part.fit(x)
        x = part(x)
    return x


class Halve(nn.Module):
    """The largest of 2 x 2 x 2 values; 0 is added at the end of an axis of an odd size.

    Not ``MaxPool3d``, whose gradient on GPUs is not repeatable.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w, d) to half of each size, rounded up."""
        for axis in (2, 3, 4):
            if x.shape[axis] % 2:
                x = F.pad(x, [0, 0] * (4 - axis) + [0, 1])
            first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.where(first > second, first, second)
        return x


class ScalarHeads(nn.Module):
    """One head for each scalar: FiLM (Perez et al. 2018) of the volumes' features by the conditioning, a residual
    layer, and a linear output.

    Args:
        scalars: in the schema's order.
        variables: how many there are, volumes included.
        model: widths.
    """

    def __init__(self, scalars: list[Scalar], variables: int, model: Widths) -> None:
        super().__init__()
        width, hidden = model.channels[-1], 2 * model.embedding
        self.conditioning = nn.Sequential(
            nn.Linear(variables * model.embedding, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.film = nn.ModuleList(nn.Linear(hidden, 2 * width) for _ in scalars)
        self.residual = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)) for _ in scalars
        )
        self.out = nn.ModuleList(
            zero_linear(width, v.size) if isinstance(v, Categorical) else _broad_density(width, model.components)
            for v in scalars
        )

    def forward(self, scalar: int, features: Tensor, conditioning: Tensor) -> Tensor:
        """
        Args:
            scalar: its place among the scalars.
            features: of the volumes, (B, C).
            conditioning: what ``self.conditioning`` makes of the tokens of all scalars and the levels of all volumes,
                from (B, variables x E).

        Returns:
            Logits (B, K), or (B, 1 + 3 components).
        """
        scale, shift = self.film[scalar](conditioning).chunk(2, 1)  # each (B, C)
        x = features * (1 + scale) + shift
        return self.out[scalar](x + self.residual[scalar](x))


def _broad_density(width: int, components: int) -> nn.Linear:
    """A linear layer whose output before training is a broad density (:mod:`mvhpc.diffusion.density`)."""
    layer = zero_linear(width, 1 + 3 * components)
    if components:
        with torch.no_grad():
            layer.bias[1 + components : 1 + 2 * components] = torch.linspace(-1.5, 1.5, components)
            layer.bias[1 + 2 * components :] = math.log(0.6)
    return layer
