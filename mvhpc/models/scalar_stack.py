"""The model of scalars: linear members and an ensemble of 3D encoders, mixed by stacking.

Every member predicts any scalar from pooled volumes and other scalars. Their laws are mixed by weights learnt from
people whom no mixed member was fitted to, once for queries that give a volume and once for others.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvhpc.diffusion.categorical import draw, probabilities
from mvhpc.diffusion.density import density, quantile
from mvhpc.diffusion.laws import Law, mix, temper
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.pooled_features import linear_features
from mvhpc.models.principal_components import Scores
from mvhpc.models.scalar_predictor import ScalarPredictor, Widths
from mvhpc.models.site_calibration import SiteCalibration
from mvhpc.variables import Categorical, Variables

MASKED = 1  # level of an unknown variable, as the encoders take it; a known one has level 0
LITTLE = 0.01  # share of the loss of predicting the mean
CONTEXTS = ("volumes", "scalars")  # whether a query gives a volume, or scalars alone


def build_encoders(variables: Variables, model: Widths) -> ScalarPredictor:
    """The 3D encoders of pooled volumes, untrained."""
    return ScalarPredictor(variables, model, MASKED)


@dataclass(frozen=True)
class Mixing:
    """How the laws of a scalar are mixed in one context.

    Attributes:
        weights: of the members, which sum to 1; the linear ones in order, then the encoders.
        temperature: of the mixture, by held-out people.
        saved: share of the loss of predicting the mean that the mixture saves for held-out people, of queries that give
            no scalar and of those that give all others; empty where it is not known.
    """

    weights: tuple[float, ...]
    temperature: float
    saved: tuple[float, ...] = ()

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> "Mixing":
        """From ``model.json``; of a model of an earlier version it is not known what it saves."""
        return cls(tuple(how["weights"]), how["temperature"], tuple(how.get("saved", ())))


@dataclass(frozen=True)
class ScalarStack:
    """The members and how they are mixed.

    Attributes:
        variables: volumes of pooled voxels, standardised by channel, and scalars.
        smoothing: of each linear member's features, SD in pooled voxels.
        linear: the linear members.
        encoders: the 3D encoders, ready for inference; None where their weights are all 0.
        mixing: scalar -> context -> mixing.
        site: calibration for another site, by scalar; empty for the training's own.
    """

    variables: Variables
    smoothing: Sequence[float]
    linear: Sequence[LinearMember]
    encoders: ScalarPredictor | None
    mixing: Mapping[str, Mapping[str, Mixing]]
    site: Mapping[str, SiteCalibration]

    def no_better(self, want: str, given: Collection[str]) -> str:
        """That a scalar is predicted no better than by the mean, in words; empty where it is, or where not known.

        Of a scalar whose calibration for a site is doubtful, what is doubtful about it.
        """
        volume = any(v.name in given for v in self.variables.volumes)
        if volume and want in self.site and self.site[want].note:
            return self.site[want].note
        scalar = any(v.name in given for v in self.variables.scalars)
        saved = self.mixing[want][CONTEXTS[0 if volume else 1]].saved
        if not given or not saved or saved[scalar] > LITTLE:
            return ""
        category = isinstance(self.variables[want], Categorical)
        return (
            f"{want}: on held-out people of the training, this model predicts it no better than "
            f"{'the frequencies of its classes' if category else 'the mean of everybody'}"
        )


class StackPosterior:
    """p(scalars | given) of B people; their volumes are read once, here.

    Args:
        stack: the model.
        pooled: of every volume variable, (B, C, h, w, d) in [0, 1]; zeros where it is not given.
        values: of every scalar, encoded, (B, 1) or (B,); any value where it is not given.
        known: by variable, in which rows it is given, (B,) bool.
    """

    def __init__(
        self,
        stack: ScalarStack,
        pooled: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
    ) -> None:
        self.stack, self.values, self.known = stack, dict(values), dict(known)
        self.scores = [
            member.scores({name: linear_features(x, sd) for name, x in pooled.items()})
            for member, sd in zip(stack.linear, stack.smoothing, strict=True)
        ]
        self.encoded = None if stack.encoders is None else encode(stack.encoders, stack.variables, pooled, known)

    def laws(self, want: Collection[str]) -> dict[str, Law]:
        """The predictive law of each wanted scalar by itself; on the CPU."""
        return {name: self._law(name, self.scores, self.encoded, self.values, self.known) for name in want}

    def draw(
        self, want: Sequence[str], uniform: Tensor, limits: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Joint draws by the chain rule: the first wanted variable, the next given that too, and so on.

        Args:
            want: scalars.
            uniform: (B, draws, len(want)) draws from (0, 1).
            limits: of numbers, the encoded values (2,) between which they are drawn; without entry anywhere.

        Returns:
            By wanted variable clean encoded values (B x draws, 1) or (B x draws,), the draws of a row together.
        """
        n = uniform.shape[1]
        rows = torch.arange(uniform.shape[0]).repeat_interleave(n)
        scores = [{name: x[rows] for name, x in of.items()} for of in self.scores]
        encoded = None if self.encoded is None else self.encoded.repeat_interleave(n, 0)
        values, known = ({k: x.repeat_interleave(n, 0) for k, x in of.items()} for of in (self.values, self.known))
        for i, name in enumerate(want):
            law, u = self._law(name, scores, encoded, values, known), uniform[..., i].reshape(-1).double().cpu()
            if isinstance(law, Tensor):
                values[name] = draw(law, u)
            else:
                if limits and name in limits:
                    low, high = (law.cdf(x.double()) for x in limits[name])  # each (B x draws,)
                    u = low + u * (high - low)
                values[name] = quantile(law, u[:, None]).float()
            known[name] = torch.ones_like(known[name])
        return {name: values[name] for name in want}

    def _law(
        self,
        want: str,
        scores: Sequence[Mapping[str, Scores]],
        encoded: Tensor | None,
        values: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
    ) -> Law:
        stack = self.stack
        laws = [m.law(want, x, values, known) for m, x in zip(stack.linear, scores, strict=True)]
        if encoded is not None and stack.encoders is not None:
            output = predict(stack.encoders, stack.variables, encoded, values, known, want)
            laws.append(law_of(output, isinstance(stack.variables[want], Categorical)))
        with_volume = torch.stack([known[v.name] for v in stack.variables.volumes]).any(0)  # (B,)
        of_volumes, of_scalars = (stack.mixing[want][context] for context in CONTEXTS)

        def by_row(first: Sequence[float], second: Sequence[float]) -> Tensor:
            chosen = torch.where(with_volume[:, None], torch.tensor(first).double(), torch.tensor(second).double())
            return chosen[:, : len(laws)]

        law = mix(laws, by_row(of_volumes.weights, of_scalars.weights))
        law = temper(law, by_row([of_volumes.temperature], [of_scalars.temperature]))
        if want in stack.site:
            law = stack.site[want].apply(law, with_volume)
        return law


def standardized(variables: Variables, pooled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pooled volumes as the encoders take them."""
    return {v.name: v.encode(pooled[v.name]) for v in variables.volumes}


def levels(known: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Levels of variables, 0 where known and 1 where not."""
    return {name: (~there).long().to(device) * MASKED for name, there in known.items()}


def encode(
    network: ScalarPredictor, variables: Variables, pooled: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> Tensor:
    """The encoders' features (B, R, C) of pooled volumes."""
    device = next(network.parameters()).device
    z = standardized(variables, {name: x.to(device) for name, x in pooled.items()})
    return network.encode(z, levels(known, device))


def predict(
    network: ScalarPredictor,
    variables: Variables,
    encoded: Tensor,
    values: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    want: str,
) -> Tensor:
    """The encoders' output (B, R, n) for one scalar, on the CPU; its own value is ignored."""
    device = encoded.device
    unknown = {**known, want: torch.zeros_like(known[want])}
    z = {v.name: values[v.name].to(device) for v in variables.scalars}
    return network.predict(encoded, z, levels(unknown, device), [want])[want].cpu()


def law_of(output: Tensor, category: bool) -> Law:
    """The law of the encoders' output (B, n) or (B, R, n), whose R members are mixed in equal parts."""
    return probabilities(output) if category else density(output)
