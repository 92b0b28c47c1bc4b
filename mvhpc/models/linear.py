"""Linear predictions of any scalar given any variables, in closed form, from one matrix of second moments.

Each volume is read as its principal components. A number is predicted by Bayesian linear regression, whose strengths of
regularisation are the most probable ones (evidence approximation, MacKay 1992), one for the components of each volume
and one for the scalars. A category is predicted by linear discriminant analysis, regularised likewise: its classes have
normal features of one covariance matrix. Both need the moments of people only, not the people.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.diffusion.laws import Law, join, normal, take
from mvhpc.variables import Categorical, Continuous, Scalar

ITERATIONS = 200
TOLERANCE = 1e-4  # relative change of the strengths
STRENGTHS = (1e-6, 1e9)  # limits; features have variances of 1 at most


@dataclass(frozen=True)
class Regression:
    """p(y | x) of a number: a normal distribution of mean ``centre + weights (x - means)``.

    Attributes:
        means: of the F features.
        centre: of y.
        weights: (F,).
        noise: variance of y about its mean.
        covariance: of the weights, (F, F).
        people: N.
    """

    means: Tensor
    centre: Tensor
    weights: Tensor
    noise: Tensor
    covariance: Tensor
    people: float

    def law(self, x: Tensor) -> MixtureSameFamily:
        """The predictive distribution of each row of features (B, F)."""
        centred = x - self.means
        variance = self.noise * (1 + 1 / self.people) + ((centred @ self.covariance) * centred).sum(1)
        return normal(self.centre + centred @ self.weights, variance.sqrt())


@dataclass(frozen=True)
class Discriminant:
    """p(class | x): softmax of ``x weights + bias``.

    Attributes:
        weights: (F, K).
        bias: (K,).
    """

    weights: Tensor
    bias: Tensor

    def law(self, x: Tensor) -> Tensor:
        """The probabilities (B, K) of each row of features (B, F)."""
        return (x @ self.weights + self.bias).softmax(1)


def strengths(scatter: Tensor, products: Tensor, squares: Tensor, people: float, blocks: Sequence[slice]) -> Tensor:
    """The most probable strength of regularisation of each feature: the ratio of noise to prior variance.

    Features of one block have one strength. MacKay's fixed point, over several targets that share the strengths.

    Args:
        scatter: of the centred features, sum over people, (F, F).
        products: of centred features and targets, (F, T).
        squares: sum of squares of each centred target, (T,).
        people: N.
        blocks: slices that cover the features.

    Returns:
        (F,), float64.
    """
    strength = torch.full(
        (len(scatter),), float(scatter.diagonal().mean().clamp(min=STRENGTHS[0])), dtype=scatter.dtype
    )
    for _ in range(ITERATIONS):
        inverse = torch.linalg.inv(scatter + strength.diag())
        weights = inverse @ products  # (F, T)
        used = 1 - strength * inverse.diagonal()  # (F,) effective parameters
        rest = squares - 2 * (weights * products).sum(0) + (weights * (scatter @ weights)).sum(0)
        noise = rest.clamp(min=1e-12) / max(people - 1 - float(used.sum()), 1.0)  # (T,)
        before, strength = strength, strength.clone()
        for block in blocks:
            fitted = (weights[block].square() / noise).sum()
            strength[block] = (len(noise) * used[block].sum() / fitted.clamp(min=1e-300)).clamp(*STRENGTHS)
        if ((strength / before).log().abs() < TOLERANCE).all():
            break
    return strength


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
        self._models: dict[tuple[str, ...], Regression | Discriminant] = {}

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
        self, want: str, features: Mapping[str, Tensor], values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Law:
        """The predictive law of a scalar given everything else that each of B people has.

        Args:
            want: a scalar; its own value is ignored.
            features, values, present: of B people, as in :meth:`rows`.

        Raises:
            ValueError: fewer than two of the people that the moments are of have the scalar and the given volumes.
        """
        rows = self.rows(features, values, present)
        names = [name for name in self.blocks if name != want]
        patterns, places = torch.stack([present[name] for name in names], 1).unique(dim=0, return_inverse=True)
        laws, order = [], []
        for i, pattern in enumerate(patterns.tolist()):
            chosen = (places == i).nonzero()[:, 0]
            model, columns = self._model(want, tuple(name for name, there in zip(names, pattern) if there))
            laws.append(model.law(rows[chosen][:, columns]))
            order.append(chosen)
        return take(join(laws), torch.cat(order).argsort())

    def _model(self, want: str, given: tuple[str, ...]) -> tuple[Regression | Discriminant, list[int]]:
        """The fitted model of a query, and the columns of rows that it takes."""
        if (want, *given) not in self._models:
            self._models[want, *given] = self._fit(want, given)
        return self._models[want, *given], [i for name in given for i in range(self.width)[self.blocks[name]]]

    def _fit(self, want: str, given: Sequence[str]) -> Regression | Discriminant:
        volumes = {name for name in given if name in self.sizes}
        place = [v.name for v in self.scalars].index(want)
        sums = [of_pattern[place] for of_pattern, there in zip(self.sums, self.patterns) if volumes <= set(there)]
        moments = torch.stack(sums).sum(0) if sums else torch.zeros(self.width, self.width, dtype=torch.float64)
        people = float(moments[0, 0])
        if people < 2:
            raise ValueError(f"fewer than two people of the training have {' and '.join([want, *sorted(volumes)])}")
        columns = [i for name in given for i in range(self.width)[self.blocks[name]]]
        targets = list(range(self.width)[self.blocks[want]])
        means, centres = moments[0, columns] / people, moments[0, targets] / people
        scatter = moments[columns][:, columns] - people * torch.outer(means, means)
        products = moments[columns][:, targets] - people * torch.outer(means, centres)
        squares = moments[targets, targets] - people * centres.square()
        inverse = self._inverse(given, scatter, products, squares, people)
        if isinstance(self.scalars[place], Continuous):
            weights = inverse @ products[:, 0]
            rest = squares[0] - 2 * weights @ products[:, 0] + weights @ scatter @ weights
            used = (inverse * scatter).sum()
            noise = (rest / (people - 1 - used).clamp(min=1)).clamp(min=1e-8)
            return Regression(means, centres[0], weights, noise, noise * inverse, people)
        counts = moments[0, targets]  # (K,)
        of_class = moments[columns][:, targets] / counts.clamp(min=1)  # (F, K), means
        between = of_class - means[:, None]
        regularised = torch.linalg.inv(inverse) if len(columns) else inverse
        within = (regularised - (between * counts) @ between.T) / max(people - len(targets), 1.0)
        weights = torch.linalg.solve(within, of_class)
        shares = (counts + 1) / (people + len(targets))
        return Discriminant(weights, shares.log() - 0.5 * (weights * of_class).sum(0))

    def _inverse(
        self, given: Sequence[str], scatter: Tensor, products: Tensor, squares: Tensor, people: float
    ) -> Tensor:
        """The inverse of the regularised scatter of the given variables' features."""
        blocks, first, scalars = [], 0, 0
        for name in given:
            width = len(range(self.width)[self.blocks[name]])
            blocks.append(slice(first, first + width))
            first += width
            scalars += 0 if name in self.sizes else width
        volumes = [block for name, block in zip(given, blocks) if name in self.sizes]
        blocks = [*volumes, slice(first - scalars, first)] if scalars else volumes
        if not blocks:
            return scatter
        return torch.linalg.inv(scatter + strengths(scatter, products, squares, people, blocks).diag())
