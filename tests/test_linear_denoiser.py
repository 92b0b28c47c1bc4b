"""The linear denoiser against the algebra of normal distributions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.sampling import sample
from mvhpc.models.bundle import JointModel, load
from mvhpc.models.linear_denoiser import SIZES, LinearDenoiser
from mvhpc.variables import Categorical, Continuous, Variables, Volume
from tests.test_joint_training import task as task_of

SETTINGS = config.DiffusionConfig(1000, 0.0015, 0.0195, "independent", 0.1, 0.4, 0.3, "v", "v", {})
VARIABLES = Variables(
    [
        Volume("t1w", (2, 2, 1, 2)),
        Volume("t2w", (1, 2, 1, 2)),
        Continuous("age", 30.0, 60.0),
        Categorical("sex", ("F", "M")),
    ]
)
D, K, S = 12, 2, 3  # eight elements of t1w, four of t2w
REST = 0.5 * torch.eye(D)  # covariance of what factors leave of people
REST[0, 4] = REST[4, 0] = 0.3  # the channels of the first cell


def diffusion() -> JointDiffusion:
    return JointDiffusion(VARIABLES, SETTINGS)


def parts() -> dict[str, Tensor]:
    """Of a linear model with known parameters."""
    g = torch.Generator().manual_seed(0)
    return {
        "effect": torch.randn(S, D, generator=g),
        "frequencies": torch.tensor([0.3, 0.7]),
        "loadings": torch.randn(K, D, generator=g),
        "rest": 0.1 + torch.rand(2 * SIZES, generator=g),
        "size": torch.tensor([0, 1, 2, 3, 3, 3, 5, 31, 32, 32, 40, 63]),
        "rotation_0": torch.linalg.qr(torch.randn(4, 2, 2, generator=g))[0],
        "rotation_1": torch.ones(4, 1, 1),
    }


def plain(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Effect, loadings and covariance of the rest of the elements as they are, before rotation."""
    turn = torch.zeros(D, D)  # from rotated elements, cell by cell, to plain ones, channel by channel
    for cell, rotation in enumerate(p["rotation_0"]):
        for channel in range(2):
            turn[2 * cell : 2 * cell + 2, 4 * channel + cell] = rotation[channel]
    turn[8:, 8:] = torch.eye(4)
    return p["effect"] @ turn, p["loadings"] @ turn, turn.T @ p["rest"][p["size"]].diag() @ turn


def features(age: Tensor, sex: Tensor) -> Tensor:
    return torch.cat([age, torch.nn.functional.one_hot(sex, 2) - torch.tensor([0.3, 0.7])], 1)


def people(n: int, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values drawn from that model, and presence."""
    g, p = torch.Generator().manual_seed(seed), parts()
    age, sex = torch.randn(n, 1, generator=g), (torch.rand(n, generator=g) < 0.7).long()
    effect, loadings, _ = plain(p)
    x = features(age, sex) @ effect + torch.randn(n, K, generator=g) @ loadings
    x = x + torch.randn(n, D, generator=g) @ torch.linalg.cholesky(REST).T
    values = {"t1w": x[:, :8].reshape(n, 2, 2, 1, 2), "t2w": x[:, 8:].reshape(n, 1, 2, 1, 2), "age": age, "sex": sex}
    return values, {name: torch.ones(n, dtype=torch.bool) for name in values}


@pytest.mark.parametrize("levels", [(500, 500), (120, 1000), (0, 700), (1000, 1000), (3, 40)])
def test_it_is_the_conditional_mean_of_a_normal_law(levels: tuple[int, int]) -> None:
    process, p = diffusion(), parts()
    values, present = people(5)
    t = {name: torch.full((5,), 0) for name in VARIABLES.names}
    t |= {"t1w": torch.full((5,), levels[0]), "t2w": torch.full((5,), levels[1])}
    noised = process.noise(values, present, t, [torch.Generator().manual_seed(i) for i in range(5)])
    v = LinearDenoiser(process, p)(noised.z, noised.t)

    z = torch.cat([noised.z["t1w"].flatten(1), noised.z["t2w"].flatten(1)], 1).double()  # (5, D)
    effect, loadings, rest = (x.double() for x in plain(p))
    covariance = loadings.T @ loadings + rest
    a = process.gaussian.abar[torch.tensor([levels[0]] * 8 + [levels[1]] * 4)]
    mean = features(values["age"], values["sex"]).double() @ effect
    of_z = a.sqrt()[:, None] * covariance * a.sqrt() + (1 - a).diag()
    expected = mean + (z - a.sqrt() * mean) @ torch.linalg.solve(of_z, a.sqrt()[:, None] * covariance)
    for name, level, where in (("t1w", levels[0], slice(0, 8)), ("t2w", levels[1], slice(8, 12))):
        x0 = process.gaussian.x0(v[name], noised.z[name], torch.full((5,), level), "v")
        if level:
            torch.testing.assert_close(x0.flatten(1), expected[:, where].float(), rtol=1e-3, atol=1e-3)
        else:
            assert (v[name] == 0).all()


def test_a_fit_finds_the_law_that_people_were_drawn_from() -> None:
    values, present = people(1_500)
    found, p = LinearDenoiser.fit(diffusion(), values, present, K), parts()
    (effect, loadings, _), (w, b, rest) = plain(p), plain(found.state_dict())
    torch.testing.assert_close(w[0], effect[0], atol=0.1, rtol=0)
    torch.testing.assert_close(w[1] - w[2], effect[1] - effect[2], atol=0.25, rtol=0)  # the classes' are collinear
    torch.testing.assert_close(b.T @ b, loadings.T @ loadings, atol=0.3, rtol=0.05)
    torch.testing.assert_close(rest, REST, atol=0.15, rtol=0)


def test_people_who_lack_a_value_do_not_change_the_law_by_what_stands_in_its_place() -> None:
    values, present = people(200)
    present["age"][:50] = False
    present["t2w"][50:80] = False
    other = {name: x.clone() for name, x in values.items()}
    other["age"][:50], other["t2w"][50:80] = 7.0, 9.0
    first, second = (LinearDenoiser.fit(diffusion(), v, present, K) for v in (values, other))
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_unknown_scalars_leave_the_mean_and_a_model_without_structure_predicts_nothing() -> None:
    process, p = diffusion(), parts()
    values, _ = people(4)
    t = {name: torch.full((4,), 1000 if name in {"age", "sex"} else 600) for name in VARIABLES.names}
    empty = p | {"effect": torch.zeros(S, D), "loadings": torch.zeros(0, D), "rest": torch.ones(2 * SIZES)}
    assert all(v.abs().max() < 1e-5 for v in LinearDenoiser(process, empty)(values, t).values())
    without = LinearDenoiser(process, p | {"effect": torch.zeros(S, D)})(values, t)
    for name, v in LinearDenoiser(process, p)(values, t).items():
        assert torch.equal(v, without[name])


def test_people_drawn_with_it_follow_the_law() -> None:
    process, p, n = diffusion(), parts(), 1000
    linear = LinearDenoiser(process, p)
    given = {"age": torch.full((n, 1), 1.5), "sex": torch.ones(n, dtype=torch.int64)}
    noise = [torch.Generator().manual_seed(i) for i in range(n)]
    both = ["t1w", "t2w"]
    drawn = sample(
        lambda z, t, want: linear(z, t),
        process,
        given,
        noise,
        conditioning="clean",
        want=both,
        steps=100,
        solver="dpm",
    )
    x = torch.cat([drawn["t1w"].flatten(1), drawn["t2w"].flatten(1)], 1)
    effect, loadings, rest = plain(p)
    mean, covariance = features(given["age"][:1], given["sex"][:1]) @ effect, loadings.T @ loadings + rest
    sd = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean[0]).abs() / sd).max() < 4 / n**0.5
    scale = sd[:, None] * sd
    assert ((torch.cov(x.T) - covariance).abs() / scale).max() < 0.25


def test_a_trained_model_keeps_it(tiny_inputs: dict[str, str], tmp_path: Path) -> None:
    task = task_of(tiny_inputs)
    assert task.linear is not None
    states = {name: network.state_dict() for name, network in task.networks.items()}
    task.export(tmp_path / "model", states, {})
    model = load(tmp_path / "model", kind=JointModel)
    assert model.linear is not None
    for name, x in task.linear.state_dict().items():
        assert torch.equal(x, model.linear.state_dict()[name])
    z = {"image": torch.randn(3, *task.diffusion.variables.volumes[0].shape)}
    z |= {"age": torch.randn(3, 1), "sex": torch.tensor([0, 1, 1])}
    t = {name: torch.tensor([0, 300, 1000]) for name in z}
    alone = model.denoiser(z, t)["image"]
    torch.testing.assert_close(model.denoise(z, t, ["image"])["image"], alone + task.linear(z, t)["image"])


def test_a_design_that_it_does_not_fit_is_refused(tiny_inputs: dict[str, str]) -> None:
    with pytest.raises(config.ConfigError, match="linear_components=8: 0 unless"):
        task_of(tiny_inputs, **{"diffusion.volume": "x0", "model.linear_components": 8})


def test_a_sampler_in_bfloat16_may_open_it() -> None:
    """The joint model opens it at its first call, under the sampler's autocast."""
    d, p = diffusion(), parts()
    g = torch.Generator().manual_seed(1)
    z = {"t1w": torch.randn(3, 2, 2, 1, 2, generator=g), "t2w": torch.randn(3, 1, 2, 1, 2, generator=g)}
    z |= {"age": torch.randn(3, 1, generator=g), "sex": torch.tensor([0, 1, 0])}
    t = dict.fromkeys(z, torch.tensor([200, 500, 900]))
    plain_v = LinearDenoiser(d, p)(z, t)
    with torch.autocast("cpu", torch.bfloat16):
        reduced_v = LinearDenoiser(d, p)(z, t)
    assert all(torch.equal(reduced_v[name], v) for name, v in plain_v.items())
