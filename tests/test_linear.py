"""Linear predictions from moments: closed forms, and invariances."""

import pytest
import torch
from torch import Tensor

from mvhpc.diffusion.laws import log_score, temper
from mvhpc.models.linear import Moments, strengths
from mvhpc.models.linear_member import LinearMember
from mvhpc.models.principal_components import PrincipalComponents
from mvhpc.variables import Categorical, Continuous, Scalar

SCALARS: list[Scalar] = [Continuous("y", -1, 1), Categorical("c", ("a", "b", "d"))]
N, R = 300, 6
NO_REST = {"v": torch.zeros(N, dtype=torch.float64)}


def people(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Features of one volume, values of two scalars, and presence; the class moves the features, both move y."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randint(0, 3, (N,), generator=g)
    x = torch.randn(N, R, generator=g, dtype=torch.float64) / torch.arange(1, R + 1)
    x[:, 1] += 0.5 * c
    y = x @ torch.linspace(1, -1, R).double() + 0.3 * (c == 2) + 0.2 * torch.randn(N, generator=g, dtype=torch.float64)
    present = {name: torch.ones(N, dtype=torch.bool) for name in ("v", "y", "c")}
    return {"v": x}, {"y": y.float()[:, None], "c": c}, present


def only(present: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x if name in names else torch.zeros_like(x) for name, x in present.items()}


def test_a_number_has_the_closed_form_posterior_predictive() -> None:
    """Equal to Bayesian linear regression from the people themselves at the strengths that the evidence gives."""
    features, values, present = people()
    law = Moments.of_people(SCALARS, features, values, present).law("y", features, NO_REST, values, only(present, "v"))
    x, y = features["v"] - features["v"].mean(0), values["y"][:, 0].double()
    scatter, products, square = x.T @ x, x.T @ (y - y.mean()), (y - y.mean()).square().sum()
    strength = strengths(scatter, products[:, None], square[None], N, [slice(0, R)])
    inverse = torch.linalg.inv(scatter + strength.diag())
    weights = inverse @ products
    noise = (square - weights @ products) / (N - 1)  # the most probable, given the strengths
    assert torch.allclose(law.mean, y.mean() + x @ weights, atol=1e-8)
    assert torch.allclose(law.variance, noise * (1 + 1 / N + ((x @ inverse) * x).sum(1)), rtol=1e-6)


def test_the_strength_is_the_most_probable_one() -> None:
    """No other strength of all features gives the targets a greater evidence."""
    features, values, _ = people(1)
    x, y = features["v"] - features["v"].mean(0), values["y"][:, 0].double()
    y = y - y.mean()
    scatter, products, square = x.T @ x, x.T @ y, (y @ y)[None]
    best = strengths(scatter, products[:, None], square, N, [slice(0, R)])

    def evidence(strength: Tensor) -> float:
        """log p(y | strength) of the normal distribution that y has, its noise the most probable one."""
        covariance = torch.eye(N, dtype=torch.float64) + x @ (x / strength).T
        rest = y @ torch.linalg.solve(covariance, y)
        return float(-0.5 * (N - 1) * rest.log() - 0.5 * torch.linalg.slogdet(covariance)[1])

    assert best.unique().numel() == 1
    assert all(evidence(best) > evidence(best * factor) for factor in (0.8, 1.25))


def test_a_category_has_the_probabilities_of_normal_classes() -> None:
    """Of classes with normal features, the regression of their indicators, tempered, finds nearly Bayes' rule."""
    g = torch.Generator().manual_seed(2)
    n = 4000
    c = torch.randint(0, 3, (n,), generator=g)
    centres = torch.tensor([[0.0, 0], [1, 0], [0, 1.5]], dtype=torch.float64)
    x = centres[c] + torch.randn(n, 2, generator=g, dtype=torch.float64)
    present = {name: torch.full((n,), name != "y") for name in ("v", "y", "c")}
    values = {"y": torch.zeros(n, 1), "c": c}
    moments = Moments.of_people(SCALARS, {"v": x}, values, present)
    found = moments.law("c", {"v": x}, {"v": torch.zeros(n).double()}, values, present)
    assert isinstance(found, Tensor)
    exact = (-0.5 * (x[:, None] - centres).square().sum(2)).softmax(1)
    assert (temper(found, 0.6) - exact).abs().mean() < 0.05
    assert (found.argmax(1) == exact.argmax(1)).double().mean() > 0.95


def test_with_nothing_given_laws_are_the_marginals() -> None:
    features, values, present = people()
    moments = Moments.of_people(SCALARS, features, values, present)
    nothing = only(present)
    y = values["y"].double()
    law = moments.law("y", features, NO_REST, values, nothing)
    assert torch.allclose(law.mean, y.mean().expand(N)) and torch.allclose(law.stddev, y.std().expand(N), rtol=0.01)
    shares = torch.bincount(values["c"]) / N
    assert torch.allclose(moments.law("c", features, NO_REST, values, nothing), shares.double().expand(N, 3), atol=0.01)


def test_rows_do_not_depend_on_their_batch() -> None:
    """Rows with different given variables are answered as each is alone."""
    features, values, present = people()
    moments = Moments.of_people(SCALARS, features, values, present)
    g = torch.Generator().manual_seed(3)
    known = {name: torch.rand(N, generator=g) < 0.5 for name in present}
    for want in ("y", "c"):
        together = log_score(moments.law(want, features, NO_REST, values, known), values[want])
        for i in range(10):
            row = slice(i, i + 1)
            part = [{n: x[row] for n, x in of.items()} for of in (features, NO_REST, values, known)]
            assert torch.allclose(log_score(moments.law(want, *part), values[want][row]), together[row], atol=1e-9)


def test_people_without_the_volume_do_not_count_in_queries_that_give_it() -> None:
    features, values, present = people()
    lacking = {**present, "v": torch.arange(N) < 200}
    with_all = Moments.of_people(SCALARS, features, values, lacking)
    alone = Moments.of_people(SCALARS, *({n: x[:200] for n, x in of.items()} for of in (features, values, present)))
    given = only(present, "v", "c")
    for want in ("y", "c"):
        found, expected = (
            log_score(m.law(want, features, NO_REST, values, given), values[want]) for m in (with_all, alone)
        )
        assert torch.allclose(found, expected, atol=1e-9)
    with pytest.raises(ValueError, match="v"):
        Moments.of_people(SCALARS, features, values, only(present, "y", "c")).law("y", features, NO_REST, values, given)


def test_principal_components_are_those_of_the_chosen_people() -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(40, 200, generator=g) * torch.linspace(3, 0.1, 200)
    chosen = torch.arange(40) < 30
    found = PrincipalComponents.fit(x, chosen, 5)
    centred = x[:30] - x[:30].mean(0)
    _, _, vectors = torch.linalg.svd(centred, full_matrices=False)
    overlap = (found.basis @ vectors[:5].T).abs()
    assert torch.allclose(overlap, torch.eye(5), atol=1e-3)
    scores = found.scores(x)
    assert torch.allclose(scores.values[:30].std(0, correction=0).float(), found.sd, rtol=1e-3)
    assert torch.allclose(scores.values[:30].square().sum(1) + scores.rest[:30], whole_length(x, found)[:30], rtol=1e-4)
    whole = found.distances(scores, 0)[:, 1]
    assert torch.allclose(whole[:30].square().mean(), torch.tensor(1.0).double(), atol=1e-4)
    assert (found.distances(scores, 5)[:, 1] <= whole + 1e-9).all()


def whole_length(x: Tensor, components: PrincipalComponents) -> Tensor:
    return ((x - components.mean) / components.scale).double().square().sum(1)


def test_linear_members_are_gaussian_processes_of_a_linear_kernel() -> None:
    """With fewer people than voxels, components and what they leave give the law of regression on all voxels."""
    g = torch.Generator().manual_seed(5)
    n, voxels = 30, 100
    x = torch.randn(2 * n, voxels, generator=g) / torch.arange(1, voxels + 1) ** 0.5
    y = (x @ torch.randn(voxels, 1, generator=g)) + 0.1 * torch.randn(2 * n, 1, generator=g)
    values, present = {"y": y}, {name: torch.ones(2 * n, dtype=torch.bool) for name in ("v", "y")}
    chosen = torch.arange(2 * n) < n
    member = LinearMember.fit(SCALARS[:1], {"v": x}, values, present, chosen, 100)
    law = member.law("y", member.scores({"v": x}), values, present)
    (model,) = member.moments._models.values()
    strength = model.strength["v"] * member.components["v"].scale.double() ** 2
    centred, target = (x - x[:n].mean(0)).double(), y[:n, 0].double() - y[:n].double().mean()
    inverse = torch.linalg.inv(centred[:n].T @ centred[:n] + strength * torch.eye(voxels))
    assert torch.allclose(law.mean, y[:n].double().mean() + centred @ inverse @ (centred[:n].T @ target), atol=1e-4)
    share = 1 + 1 / n + ((centred @ inverse) * centred).sum(1)
    assert torch.allclose(law.variance, model.noise * share, rtol=1e-3)
