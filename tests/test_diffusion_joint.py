"""Laws of the joint forward process and its loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion, Noised
from mvhpc.runtime.randomness import generator
from tests.mixed_law import VARIABLES, MixedLaw, diffusion, stderr

N = 4000


def generators(n: int = N) -> list[torch.Generator]:
    return [generator("joint", i) for i in range(n)]


def levels(n: int, **t: int) -> dict[str, Tensor]:
    return {name: torch.full((n,), t[name]) for name in VARIABLES.names}


def ideal(noised: Noised) -> dict[str, Tensor]:
    """Outputs that say exactly what they should, as leaves that take gradients."""
    outputs = {name: noised.target[name].clone() for name in ("image", "age")}
    outputs["sex"] = 50.0 * torch.nn.functional.one_hot(noised.target["sex"], 3)
    return {name: (value + 0.1).requires_grad_() for name, value in outputs.items()}


def test_shared_levels_are_equal_and_uniform() -> None:
    t = diffusion("shared").draw_times(generators())
    assert torch.equal(t["image"], t["age"])
    assert torch.equal(t["image"], t["sex"])
    assert t["age"].min() >= 1
    assert t["age"].max() <= 1000
    assert t["age"].double().mean().item() == pytest.approx(500.5, abs=stderr(N, 289))


def test_independent_levels_have_their_point_masses() -> None:
    """Shared in 0.3 of the rows; else at rest at 0 in 0.2 and at T in 0.1, each variable by itself."""
    t = diffusion().draw_times(generators())
    alike = (t["image"] == t["age"]) & (t["age"] == t["sex"])
    chance = 0.7 * (0.2**3 + 0.1**3)  # all at rest at one end
    assert alike.double().mean().item() == pytest.approx(0.3 + chance, abs=stderr(N, 0.5))
    for name in VARIABLES.names:
        assert (t[name] == 0).double().mean().item() == pytest.approx(0.7 * 0.2, abs=stderr(N, 0.35))
        at_end = 0.7 * 0.1 + (1 - 0.7 * 0.3) / 1000
        assert (t[name] == 1000).double().mean().item() == pytest.approx(at_end, abs=stderr(N, 0.26))
    rest = {name: t[name][~alike] == 0 for name in VARIABLES.names}
    both = (rest["image"] & rest["age"]).double().mean()
    assert both.item() == pytest.approx(0.2**2, abs=0.02)


def test_a_network_of_volumes_alone_always_has_one_to_denoise() -> None:
    """Rows with a volume that moves anyway keep their levels, and scalars are as ever."""
    process = diffusion()
    free, moving = (process.draw_times(generators(), volumes_move=way) for way in (False, True))
    still = free["image"] == 0
    assert still.any() and (moving["image"] > 0).all()
    assert torch.equal(moving["image"][~still], free["image"][~still])
    assert moving["image"][still].double().mean().item() == pytest.approx(500.5, abs=stderr(int(still.sum()), 289))
    assert all(torch.equal(moving[name], free[name]) for name in ("age", "sex"))


def test_noised_values_have_the_forward_marginal() -> None:
    process = diffusion()
    people = {name: value.expand(N, *value.shape[1:]) for name, value in MixedLaw(process).draw(1, 0).items()}
    noised = process.noise(people, {}, levels(N, image=300, age=600, sex=500), generators())
    for name, t in (("image", 300), ("age", 600)):
        abar = process.gaussian.abar[t].item()
        z, x0 = noised.z[name].flatten(1).double(), people[name].flatten(1).double()
        torch.testing.assert_close(z.mean(0), abar**0.5 * x0[0], atol=stderr(N), rtol=0)
        torch.testing.assert_close(z.var(0), torch.full_like(x0[0], 1 - abar), atol=stderr(N, 1.5), rtol=0)
    law = process.categorical.marginal(torch.nn.functional.one_hot(people["sex"][:1], 3), 500)[0]
    share = noised.z["sex"].bincount(minlength=3) / N
    torch.testing.assert_close(share.double(), law, atol=stderr(N, 0.5), rtol=0)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_targets_are_what_the_sampler_reads_back(kind: str) -> None:
    process = diffusion(kind=kind)
    people = MixedLaw(process).draw(8, 1)
    noised = process.noise(people, {}, levels(8, image=40, age=900, sex=10), generators(8))
    for name in ("image", "age"):
        x0 = process.predict(VARIABLES[name], noised.target[name], noised.z[name], noised.t[name])
        torch.testing.assert_close(x0, people[name], atol=1e-4, rtol=0)


def test_noise_of_a_row_comes_from_its_generator_alone() -> None:
    process = diffusion()
    people = MixedLaw(process).draw(6, 1)
    g = generators(6)
    whole = process.noise(people, {}, process.draw_times(g), g)
    g = generators(6)[4:]
    part = process.noise({name: v[4:] for name, v in people.items()}, {}, process.draw_times(g), g)
    for name in VARIABLES.names:
        assert torch.equal(whole.z[name][4:], part.z[name])
        assert torch.equal(whole.t[name][4:], part.t[name])


@pytest.mark.parametrize("time", ["shared", "independent"])
def test_a_missing_value_has_no_loss_no_gradient_and_no_effect(time: str) -> None:
    process = diffusion(time)
    people = MixedLaw(process).draw(4, 1)
    there = torch.tensor([True, False, True, False])
    present = dict.fromkeys(VARIABLES.names, there)
    t = levels(4, image=300, age=300, sex=300)
    noised = process.noise(people, present, t, generators(4))
    other = {
        "image": people["image"].masked_fill(~there.reshape(-1, 1, 1, 1, 1), float("nan")),
        "age": people["age"].masked_fill(~there[:, None], float("nan")),
        "sex": torch.where(there, people["sex"], 2 - people["sex"]),
    }
    again = process.noise(other, present, t, generators(4))
    outputs = ideal(noised)
    losses = process.losses(outputs, noised)
    process.total(losses).sum().backward()
    for name in VARIABLES.names:
        assert torch.equal(noised.z[name], again.z[name])
        assert torch.equal(noised.target[name], again.target[name])
        assert (losses[name][~there] == 0).all()
        gradient = outputs[name].grad
        assert gradient is not None
        assert (gradient[~there] == 0).all()
        expected = [300, 1000, 300, 1000] if time == "independent" else [300] * 4
        assert noised.t[name].tolist() == expected
    assert (losses["image"][there] > 0).all()


def test_a_missing_value_is_fed_as_pure_noise() -> None:
    process = diffusion()
    people = {name: value.expand(N, *value.shape[1:]) for name, value in MixedLaw(process).draw(1, 0).items()}
    nobody = dict.fromkeys(VARIABLES.names, torch.zeros(N, dtype=torch.bool))
    noised = process.noise(people, nobody, levels(N, image=1, age=1, sex=1), generators())
    assert noised.z["age"].mean().item() == pytest.approx(0, abs=stderr(N))
    assert noised.z["age"].std().item() == pytest.approx(1, abs=stderr(N))
    share = noised.z["sex"].bincount(minlength=3) / N
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=stderr(N, 0.5), rtol=0)


def test_a_value_at_rest_at_zero_is_clean_and_has_no_loss() -> None:
    process = diffusion()
    people = MixedLaw(process).draw(4, 1)
    noised = process.noise(people, {}, levels(4, image=0, age=0, sex=0), generators(4))
    for name in VARIABLES.names:
        assert torch.equal(noised.z[name], people[name])
        assert (process.losses(ideal(noised), noised)[name] == 0).all()


def test_loss_is_the_mean_square_or_cross_entropy_and_weighted() -> None:
    process = diffusion(weights={"sex": 3.0})
    noised = process.noise(MixedLaw(process).draw(5, 1), {}, levels(5, image=9, age=9, sex=9), generators(5))
    outputs = {name: noised.target[name] + 2 for name in ("image", "age")}
    outputs["sex"] = torch.zeros(5, 3)
    losses = process.losses(outputs, noised)
    torch.testing.assert_close(losses["image"], torch.full((5,), 4.0))
    torch.testing.assert_close(losses["age"], torch.full((5,), 4.0))
    torch.testing.assert_close(losses["sex"], torch.full((5,), 3.0).log())
    torch.testing.assert_close(process.total(losses), 8 + 3 * losses["sex"])


def test_the_exact_denoiser_has_the_least_loss() -> None:
    """No output does better on average than the law's own conditional expectations."""
    process = diffusion()
    law = MixedLaw(process)
    noised = process.noise(law.draw(N, 3), {}, levels(N, image=200, age=500, sex=400), generators())
    best = law(noised.z, noised.t, VARIABLES.names)
    least = {name: loss.mean() for name, loss in process.losses(best, noised).items()}
    g = torch.Generator().manual_seed(0)
    for name in VARIABLES.names:
        for scale in (-0.3, 0.3):
            off = scale * torch.randn(best[name].shape[1:], generator=g)
            worse = process.losses({**best, name: best[name] + off}, noised)
            assert worse[name].mean() > least[name]


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_step_is_made_where_the_values_are(kind: str) -> None:
    """Without a GPU: tensors of the device "meta" do not mix with those of the host either."""
    process, rows = diffusion(kind=kind).to("meta"), generators(3)
    for v in VARIABLES:
        z = process.prior(v, rows)
        output = torch.zeros(3, 3) if v.name == "sex" else torch.zeros(z.shape)
        x0 = process.predict(v, output.to("meta"), z, torch.full((3,), 500, device="meta"))
        assert x0.device.type == "meta"
        if v.name == "sex":  # a step of numbers looks its signal-to-noise ratio up, which a meta tensor has not
            assert process.step(v, x0, z, 500, 400, rows).device.type == "meta"
        assert process.renoise(v, z, 500, rows, 400).device.type == "meta"


def test_what_is_misspelt_is_named() -> None:
    def build(**change: Any) -> JointDiffusion:
        fields: dict[str, Any] = {
            "time": "shared",
            "volume": "eps",
            "continuous": "v",
            "weights": {},
            **change,
        }
        return JointDiffusion(
            VARIABLES,
            config.DiffusionConfig(
                1000, 0.0015, 0.0195, shared_fraction=0, clean_fraction=0, noise_fraction=0, **fields
            ),
        )

    cases: list[tuple[dict[str, Any], str]] = [
        ({"time": "indipendent"}, "Did you mean 'independent'"),
        ({"volume": "epsilon"}, "Did you mean 'eps'"),
        ({"weights": {"aeg": 1.0}}, "Did you mean 'age'"),
        ({"continuous": "x00"}, "Did you mean 'x0'"),
    ]
    for change, match in cases:
        with pytest.raises(config.ConfigError, match=match):
            build(**change)
