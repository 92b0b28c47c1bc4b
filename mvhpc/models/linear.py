"""Linear predictions of any scalar given any variables, in closed form, from one matrix of second moments.

Each volume is read as its principal components. A number is predicted by Bayesian linear regression, whose strengths of
regularisation are the most probable ones (evidence), one for the components of each volume and one for the scalars. A
category is predicted by the same regression of its indicators, whose predictive distributions give probabilities
(least-squares classification, Rasmussen and Williams 2006, section 6.5). Both need moments of the people only.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from mvhpc.diffusion.laws import LEAST, Law, join, normal, take
from mvhpc.variables import Categorical, Scalar

GRID = (-10, 13)  # logarithms of the strengths that are tried first, relative to the features' scatter
TOLERANCE = {"xatol": 0.02, "fatol": 1e-3}


@dataclass(frozen=True)
class Regression:
    """Bayesian linear regression of T targets on F features.

    Attributes:
        means: of the features, (F,).
        centres: of the targets, (T,).
        weights: (F, T).
        noise: variance of the targets about their means, (T,).
        inverse: covariance of the weights in units of the noise, (F, F).
        strength: noise by prior variance, of the weights of each volume's features.
        people: N.
    """

    means: Tensor
    centres: Tensor
    weights: Tensor
    noise: Tensor
    inverse: Tensor
    strength: dict[str, float]
    people: float

    def predict(self, x: Tensor, rests: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, T) of the targets.

        Args:
            x: features, (B, F).
            rests: of each volume, squared length (B,) of what its features leave: the weights of what no person of the
                training varies in are those of the prior.
        """
        centred = x - self.means
        share = 1 + 1 / self.people + ((centred @ self.inverse) * centred).sum(1)
        share = share + sum(rests[name] / strength for name, strength in self.strength.items())
        return self.centres + centred @ self.weights, self.noise * share[:, None]


def class_probabilities(mean: Tensor, variance: Tensor) -> Tensor:
    """Probabilities (B, K) of classes from the predictive distributions of their indicators, (B, K)."""
    p = torch.special.ndtr((mean - 0.5) / variance.sqrt()).clamp(min=LEAST)
    return p / p.sum(1, keepdim=True)


def strengths(scatter: Tensor, products: Tensor, squares: Tensor, people: float, blocks: Sequence[slice]) -> Tensor:
    """The most probable strength of regularisation of each feature: the ratio of noise to prior variance.

    Features of one block have one strength. They maximise the evidence, in which the noise is the most probable one and
    the mean of each target is free; several targets share the strengths.

    Args:
        scatter: of the centred features, sum over people, (F, F).
        products: of centred features and targets, (F, T).
        squares: sum of squares of each centred target, (T,).
        people: N.
        blocks: slices that cover the features.

    Returns:
        (F,), float64.
    """

    def spread_out(logs: Sequence[float]) -> Tensor:
        strength = torch.empty(len(scatter), dtype=scatter.dtype)
        for log, block in zip(logs, blocks, strict=True):
            strength[block] = math.exp(log)
        return strength

    def objective(logs: Sequence[float]) -> float:
        return -evidence(scatter, products, squares, people, spread_out(logs))

    typical = math.log(max(float(scatter.diagonal().mean()), 1e-12))
    grid = [typical + step for step in range(*GRID)]
    start = min(grid, key=lambda log: objective([log] * len(blocks)))
    limits = [(grid[0], grid[-1])] * len(blocks)
    found = minimize(objective, [start] * len(blocks), bounds=limits, method="Nelder-Mead", options=TOLERANCE)
    return spread_out(found.x)


def evidence(scatter: Tensor, products: Tensor, squares: Tensor, people: float, strength: Tensor) -> float:
    """The logarithm of the probability of T targets, up to a constant; arguments as in :func:`strengths`."""
    factor = torch.linalg.cholesky(scatter + strength.diag())
    explained = torch.linalg.solve_triangular(factor, products, upper=False).square().sum(0)  # (T,)
    rest = (squares - explained).clamp(min=1e-12)
    logdet = 2 * factor.diagonal().log().sum() - strength.log().sum()
    return float(-0.5 * ((people - 1) * rest.log().sum() + len(squares) * logdet))


class Moments:
    """Second moments of features and scalars, from which any query is answered.

    Args:
        scalars: in the schema's order.
        sizes: volume -> number of its features.
        sums: (patterns, scalars, F, F), by :meth:`of_people`.
        patterns: for each, the volumes that its people have.
    """

    def __init__(
        self, scalars: Sequence[Scalar], sizes: Mapping[str, int], sums: Tensor, patterns: Sequence[Collection[str]]
    ) -> None:
        self.scalars, self.sizes, self.sums, self.patterns = list(scalars), dict(sizes), sums, list(patterns)
        self.blocks, first = {}, 1  # name -> its columns; the first is 1
        widths = {v.name: v.size if isinstance(v, Categorical) else 1 for v in self.scalars}
        for name, width in (*sizes.items(), *widths.items()):
            self.blocks[name] = slice(first, first + width)
            first += width
        self.width = first
        self._models: dict[tuple[str, ...], Regression] = {}

    @classmethod
    def of_people(
        cls,
        scalars: Sequence[Scalar],
        features: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
    ) -> "Moments":
        """The moments of N people.

        Args:
            scalars: in the schema's order.
            features: of each volume (N, R).
            values: encoded scalars, (N, 1) or (N,); a missing one counts as the mean of all.
            present: by variable, (N,) bool.
        """
        model = cls(scalars, {name: x.shape[1] for name, x in features.items()}, torch.empty(0), [])
        rows = model.rows(features, values, present)
        has = torch.stack([present[name] for name in features], 1)  # (N, V)
        kinds = has.unique(dim=0)
        kept = [[rows[(has == kind).all(1) & present[v.name]] for v in scalars] for kind in kinds]
        model.sums = torch.stack([torch.stack([x.T @ x for x in of_kind]) for of_kind in kept])
        model.patterns = [[name for name, there in zip(features, kind) if there] for kind in kinds.tolist()]
        return model

    def rows(
        self, features: Mapping[str, Tensor], values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Tensor:
        """People as rows of numbers (N, F), float64: 1, features of the volumes, scalars; 0 for what is not present.

        Args:
            features: of each volume (N, R).
            values, present: by variable, as in :meth:`of_people`.
        """
        columns = [torch.ones(len(next(iter(present.values()))), 1, dtype=torch.float64)]
        for name in self.sizes:
            columns.append(features[name].double() * present[name][:, None])
        for v in self.scalars:
            x = F.one_hot(values[v.name], v.size) if isinstance(v, Categorical) else values[v.name]
            columns.append(x.double() * present[v.name][:, None])
        return torch.cat(columns, 1)

    def law(
        self,
        want: str,
        features: Mapping[str, Tensor],
        rests: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
    ) -> Law:
        """The predictive law of a scalar given everything else that each of B people has.

        Args:
            want: a scalar; its own value is ignored.
            features, values, present: of B people, as in :meth:`rows`.
            rests: of each volume, squared length (B,) of what its features leave.

        Raises:
            ValueError: fewer than two of the people that the moments are of have the scalar and the given volumes.
        """
        rows = self.rows(features, values, present)
        names = [name for name in self.blocks if name != want]
        patterns, places = torch.stack([present[name] for name in names], 1).unique(dim=0, return_inverse=True)
        laws, order = [], []
        for i, pattern in enumerate(patterns.tolist()):
            chosen = (places == i).nonzero()[:, 0]
            given = tuple(name for name, there in zip(names, pattern) if there)
            of_chosen = rows[chosen][:, [i for name in given for i in self._columns(name)]]
            laws.append(self._law(want, given, of_chosen, {name: x[chosen] for name, x in rests.items()}))
            order.append(chosen)
        return take(join(laws), torch.cat(order).argsort())

    def _columns(self, name: str) -> range:
        return range(self.width)[self.blocks[name]]

    def _law(self, want: str, given: tuple[str, ...], x: Tensor, rests: Mapping[str, Tensor]) -> Law:
        """The law of a scalar of people with features x, (B, F), of exactly the given variables."""
        if (want, *given) not in self._models:
            self._models[want, *given] = self._fit(want, given)
        model = self._models[want, *given]
        mean, variance = model.predict(x, rests)
        if any(isinstance(v, Categorical) for v in self.scalars if v.name == want):
            return class_probabilities(mean, variance) if given else mean
        return normal(mean[:, 0], variance[:, 0].sqrt())

    def _fit(self, want: str, given: Sequence[str]) -> Regression:
        volumes = [name for name in given if name in self.sizes]
        place = [v.name for v in self.scalars].index(want)
        sums = [of_pattern[place] for of_pattern, there in zip(self.sums, self.patterns) if {*volumes} <= {*there}]
        moments = torch.stack(sums).sum(0) if sums else torch.zeros(self.width, self.width, dtype=torch.float64)
        people = float(moments[0, 0])
        if people < 2:
            raise ValueError(f"fewer than two people of the training have {' and '.join([want, *volumes])}")
        columns, targets = [i for name in given for i in self._columns(name)], list(self._columns(want))
        means, centres = moments[0, columns] / people, moments[0, targets] / people
        scatter = moments[columns][:, columns] - people * torch.outer(means, means)
        products = moments[columns][:, targets] - people * torch.outer(means, centres)
        squares = (moments[targets, targets] - people * centres.square()).clamp(min=1e-8)
        strength = torch.zeros(0, dtype=torch.float64)
        if columns:
            blocks = list(self._blocks(given))
            strength = strengths(scatter, products, squares, people, [block for _, block in blocks])
        inverse = torch.linalg.inv(scatter + strength.diag())
        weights = inverse @ products
        noise = ((squares - (weights * products).sum(0)) / (people - 1)).clamp(min=1e-8)
        of_volumes = {name: float(strength[block][0]) for name, block in blocks if name} if columns else {}
        return Regression(means, centres, weights, noise, inverse, of_volumes, people)

    def _blocks(self, given: Sequence[str]) -> Iterator[tuple[str, slice]]:
        """Of the given variables' features: those of each volume with its name, and at last those of all scalars."""
        first = 0
        for name in given:
            if name in self.sizes:
                yield name, slice(first, first + self.sizes[name])
                first += self.sizes[name]
        if any(name not in self.sizes for name in given):
            yield "", slice(first, None)
