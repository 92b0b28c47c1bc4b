"""How the members of the model of scalars are mixed, and what distance from the training's scans is usual."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from mvhpc.diffusion.laws import Law, join, log_score, mix, stacking_weights, take, temper
from mvhpc.models.conformal import FEWEST, conformal_temperature, needed_stretch
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.scalar_predictor import ScalarPredictor
from mvhpc.models.scalar_stack import CONTEXTS, Mixing, encode, law_of, predict
from mvhpc.variables import Categorical, Variables

BATCH = 64  # people encoded at a time
PRIOR = math.log(2)  # SD of the prior of a category's log temperature; with few people it stays near 0
LIMITS = (math.log(0.25), math.log(8))  # of the log temperature
NEGLIGIBLE = 0.05  # weight of a member that is left out
CHANCE = 2.0  # standard errors over people


class HeldOut(Protocol):
    """PooledRecords of the training; see :class:`mvhpc.training.scalars.PooledRecords`."""

    @property
    def pooled(self) -> Mapping[str, Tensor]: ...
    @property
    def values(self) -> Mapping[str, Tensor]: ...
    @property
    def present(self) -> Mapping[str, Tensor]: ...


def stack_members(
    variables: Variables,
    people: HeldOut,
    features: Sequence[Mapping[str, Tensor]],
    linear: Sequence[Sequence[LinearMember]],
    in_fold: Tensor,
    encoders: ScalarPredictor,
) -> dict[str, dict[str, Mixing]]:
    """The mixing of each scalar in each context, by predictions of people whom the members were not fitted to.

    Every scalar is predicted given the volumes, and given the volumes and all other scalars; given all other scalars,
    and given nothing.

    Args:
        variables: volumes of pooled voxels and scalars.
        people: N of them.
        features: for each linear member, by volume (N, P).
        linear: for each fold, the linear members of everybody else.
        in_fold: (N, R) bool, False in the fold that a person is held out from.
        encoders: ready for inference; its members are the folds'.
    """
    fold = (~in_fold).int().argmax(1)  # (N,)
    encoded = _encode(variables, people, encoders)
    volumes = [v.name for v in variables.volumes]
    nobody = torch.zeros(len(fold), dtype=torch.bool)
    mixing: dict[str, dict[str, Mixing]] = {}
    for v in variables.scalars:
        others = [s.name for s in variables.scalars if s.name != v.name]
        mixing[v.name] = {}
        for context in CONTEXTS:
            shown = volumes if context == CONTEXTS[0] else []
            has = torch.stack([people.present[name] for name in volumes]).any(0) if shown else ~nobody
            rows = (has & people.present[v.name]).nonzero()[:, 0]
            laws: list[list[Law]] = []
            for given in ([*shown], [*shown, *others]):
                known = {name: x if name in given else nobody for name, x in people.present.items()}
                laws.append(
                    _held_out_laws(v.name, variables, people, features, linear, fold, encoders, encoded, known, rows)
                )
            mixing[v.name][context] = _mixing(laws, people.values[v.name][rows])
    return mixing


def _encode(variables: Variables, people: HeldOut, encoders: ScalarPredictor) -> tuple[Tensor, Tensor]:
    """Features (N, R, C) of the volumes that people have, and those of no volume."""
    parts = torch.arange(len(next(iter(people.values.values())))).split(BATCH)
    volumes = [v.name for v in variables.volumes]

    def features(shown: bool) -> Tensor:
        return torch.cat(
            [
                encode(
                    encoders,
                    variables,
                    {name: people.pooled[name][part].float() for name in volumes},
                    {name: people.present[name][part] & shown for name in volumes},
                )
                for part in parts
            ]
        )

    seen = features(True)
    return seen, torch.zeros_like(seen)  # as ScalarPredictor.encode makes them


def _held_out_laws(
    want: str,
    variables: Variables,
    people: HeldOut,
    features: Sequence[Mapping[str, Tensor]],
    linear: Sequence[Sequence[LinearMember]],
    fold: Tensor,
    encoders: ScalarPredictor,
    encoded: tuple[Tensor, Tensor],
    known: Mapping[str, Tensor],
    rows: Tensor,
) -> list[Law]:
    """The law of each member for the people ``rows``, each person's by members of its own fold."""
    laws: list[Law] = []
    for i, of_member in enumerate(features):
        found, order = [], []
        for k, members in enumerate(linear):
            chosen = rows[fold[rows] == k]
            if not len(chosen):
                continue
            scores = members[i].scores({name: x[chosen] for name, x in of_member.items()})
            values, there = ({n: x[chosen] for n, x in of.items()} for of in (people.values, known))
            found.append(members[i].law(want, scores, values, there))
            order.append((fold[rows] == k).nonzero()[:, 0])
        laws.append(take(join(found), torch.cat(order).argsort()))
    shown = torch.stack([known[v.name] for v in variables.volumes]).any(0)
    latent = torch.where(shown[:, None, None].to(encoded[0].device), *encoded)[rows]
    values, there = ({n: x[rows] for n, x in of.items()} for of in (people.values, known))
    output = predict(encoders, variables, latent, values, there, want)  # (n, R, ...)
    laws.append(law_of(output[torch.arange(len(rows)), fold[rows]], isinstance(variables[want], Categorical)))
    return laws


def member_weights(scores: Tensor) -> list[float]:
    """The members' weights from log scores (queries, N, M).

    The encoders, the last member, have none unless they raise the log score of the mixture by more than chance.
    """
    queries, people, members = scores.shape

    def fit(count: int) -> tuple[list[float], Tensor]:
        """Weights of the first members, and the mixture's log score (N,), mean over queries."""
        weights = stacking_weights(scores[..., :count].flatten(0, 1), prior=float(queries))
        kept = torch.tensor([w if w >= NEGLIGIBLE else 0.0 for w in weights], dtype=torch.float64)
        kept = kept / kept.sum()
        return kept.tolist(), (scores[..., :count] + kept.log()).logsumexp(-1).mean(0)

    weights, score = fit(members)
    others, without = fit(members - 1)
    gain = score - without
    return weights if gain.mean() > CHANCE * gain.std() / math.sqrt(people) else [*others, 0.0]


def _mixing(laws: Sequence[Sequence[Law]], truth: Tensor) -> Mixing:
    """The mixing by several queries about the same people: members' weights, the temperature of the mixture, and what
    it saves."""
    members = len(laws[0])
    if not len(truth):
        return Mixing((1 / members,) * members, 1.0)
    weights = member_weights(
        torch.stack([torch.stack([log_score(law, truth) for law in of_query], 1) for of_query in laws])
    )
    columns = torch.tensor([weights], dtype=torch.float64).expand(len(truth), -1)
    mixed = [mix(of_query, columns) for of_query in laws]
    temperature = _temperature(mixed, truth)
    return Mixing(tuple(weights), temperature, tuple(_saved(temper(law, temperature), truth) for law in mixed))


def _saved(law: Law, truth: Tensor) -> float:
    """Share of the loss of a constant prediction, the mean or the frequencies of all, that a law saves; at least -1.

    The loss of a number is its absolute error, that of a category the negative logarithm of its probability.
    """
    if isinstance(law, Tensor):
        frequencies = truth.bincount(minlength=law.shape[1]) / len(truth)
        own, constant = -log_score(law, truth), -frequencies[truth].log()
    else:
        values = truth[:, 0].double()
        own, constant = (values - law.mean).abs(), (values - values.mean()).abs()
    return max(float(1 - own.sum() / constant.sum()), -1.0) if constant.sum() else 0.0


def _temperature(laws: Sequence[Law], truth: Tensor) -> float:
    """The temperature of several laws of the same people.

    That of a number is conformal, the geometric mean over the laws; 1 where the people are too few for that. That of a
    category makes the people most probable.
    """
    numbers = [law for law in laws if not isinstance(law, Tensor)]
    if numbers and len(truth) < FEWEST:
        return 1.0
    if numbers:
        errors = [truth[:, 0].double() - law.mean for law in numbers]
        found = [conformal_temperature(needed_stretch(law, error)) for law, error in zip(numbers, errors)]
        return float(np.clip(math.prod(found) ** (1 / len(found)), *np.exp(LIMITS)))

    def objective(log: float) -> float:
        nll = -sum(log_score(temper(law, math.exp(log)), truth).sum() for law in laws) / len(laws)
        return float(nll) + 0.5 * (log / PRIOR) ** 2

    return math.exp(minimize_scalar(objective, bounds=LIMITS, method="bounded").x)
