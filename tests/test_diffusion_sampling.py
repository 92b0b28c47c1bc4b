"""Laws of the samplers, under the exact denoiser of a law whose conditionals are known, and under a network."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mvhpc import config
from mvhpc.diffusion.gaussian import Gaussian
from mvhpc.diffusion.sampling import levels, sample, time_grid
from mvhpc.diffusion.schedules import scaled_linear
from mvhpc.inference.generate import GenerateConfig
from mvhpc.inference.translate import TranslateConfig
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.runtime.randomness import generator
from tests.mixed_law import VARIABLES, MixedLaw, diffusion, flat, mixture, one_hot_share, stderr
from tests.networks import perturbed, settings

N = 1500
TRANSLATE = ["data=d", "given=[age]", "want=image"]
FINE: dict[str, Any] = {
    "steps": 200,
    "stride": 20,
}  # DDIM's own bias, first order in the step, is then 1 to 2 % of an SD


def generators(n: int, *parts: object) -> list[torch.Generator]:
    return [generator(*parts, i) for i in range(n)]


def repeated(person: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {name: value.expand(n, *value.shape[1:]) for name, value in person.items()}


def network() -> JointDenoiser:
    """A small network with nothing at its initial zeros."""
    return perturbed(VARIABLES, settings("early", channels=[8, 8], head_channels=4, embedding=8))


def test_time_grid_is_even_whole_and_shared() -> None:
    gaussian, small = diffusion().gaussian, Gaussian(scaled_linear(10, 0.0015, 0.0195))
    assert time_grid(gaussian, 50, 20) == list(range(1000, -1, -20)) == time_grid(gaussian, 50)
    assert time_grid(gaussian, 3) == [1000, 667, 333, 0]
    assert time_grid(gaussian, 2, 400) == [1000, 600, 500, 200, 0]
    assert time_grid(small, 10, 3) == list(range(10, -1, -1))


def test_only_a_category_that_is_drawn_adds_levels() -> None:
    """Counted by network calls: 10 of the solver, or those of its grid and the category's together."""
    process, net, called = diffusion(), network(), []

    def counted(z: dict[str, Tensor], t: dict[str, Tensor], want: list[str]) -> Any:
        called.append(want)
        return net(z, t, want)

    options: dict[str, Any] = {"steps": 10, "stride": 20, "solver": "dpm"}
    person = {name: value[:2] for name, value in MixedLaw(process).draw(2, seed=5).items()}
    some = {"sex": torch.tensor([True, False])}
    both = len(time_grid(process.gaussian, 10, 20, "dpm")) - 1
    for given, conditioning, want, present, expected in [
        (["sex"], "clean", ["age"], {}, 10),
        (["image"], "clean", ["age"], {}, 10),  # the class is neither given nor wanted
        (["sex"], "clean", ["age"], some, 10),  # the same where it is missing
        (["image"], "clean", ["sex"], {}, both),
        (["sex"], "repaint", ["age"], {}, 10),
        (["sex"], "repaint", ["age"], some, both),  # of a row that lacks it the class is drawn
        (["image"], "repaint", ["age"], {}, both),
        ([], "clean", None, {}, both),
    ]:
        called.clear()
        known = {name: person[name] for name in given}
        sample(counted, process, known, generators(2), want=want, present=present, conditioning=conditioning, **options)
        assert len(called) == expected > 0


def test_categories_may_step_with_the_solver_of_any_model() -> None:
    """As generation and translation do by default; also with fewer than 1,000 levels."""
    for kind, folder, more in ((GenerateConfig, "generate", []), (TranslateConfig, "translate", TRANSLATE)):
        sampling = config.load_config(kind, folder, "default", ["out=o", "model=m", *more]).sampling
        small = diffusion(steps=100)
        grid = levels(small, VARIABLES.names, sampling.steps, sampling.stride, sampling.solver)
        assert grid == time_grid(small.gaussian, sampling.steps, 0, sampling.solver)
        drawn = sample(
            MixedLaw(small), small, {}, generators(3), **config.to_dict(sampling) | {"conditioning": "clean"}
        )
        assert drawn["sex"].shape == (3,)
    process = diffusion()
    alike = [
        sample(MixedLaw(process), process, {}, generators(50), steps=10, solver="dpm", stride=stride)
        for stride in (0, process.steps)
    ]
    assert all(torch.equal(alike[0][name], alike[1][name]) for name in VARIABLES.names)
    with pytest.raises(config.ConfigError, match=r"sampling\.stride=1000: take from 1 to 100, .* or 0, with which"):
        time_grid(small.gaussian, 10, 1000)


@pytest.mark.parametrize("sd", [0.35, 0.5, 0.7, 1.0])
def test_ten_steps_of_second_order_keep_the_spread_of_a_gaussian(sd: float) -> None:
    """With the exact denoiser of N(0, sd^2) a step is linear: what becomes of 1 at T is the SD of what is drawn."""
    gaussian = diffusion().gaussian
    grid = time_grid(gaussian, 10, solver="dpm")
    assert (grid[0], grid[-1], len(grid)) == (1000, 0, 11)
    z, before = torch.ones(1, dtype=torch.float64), None
    for t, s in pairwise(grid):
        share = gaussian.abar[t]
        x0 = z * share.sqrt() * sd**2 / (share * sd**2 + 1 - share)
        z, before = gaussian.dpm_step(z, x0, t, s, before), (x0, t)
    assert z.item() == pytest.approx(sd, rel=0.02)


@pytest.mark.parametrize("steps, stride", [(0, 20), (1001, 20), (50, -1), (50, 1001)])
def test_impossible_grids_are_refused(steps: int, stride: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        time_grid(diffusion().gaussian, steps, stride)


@pytest.mark.parametrize("time, kind", [("shared", "eps"), ("independent", "v"), ("independent", "x0")])
def test_joint_law_is_reproduced(time: str, kind: str) -> None:
    """Class frequencies, and mean and covariance given the class."""
    process = diffusion(time, kind)
    law = MixedLaw(process)
    drawn = sample(law, process, {}, generators(N, time, kind), **FINE)
    share = one_hot_share(drawn["sex"])
    torch.testing.assert_close(share, law.prior, atol=stderr(N, 0.5), rtol=0)
    for k in range(3):
        x = flat(drawn)[drawn["sex"] == k]
        torch.testing.assert_close(x.mean(0), law.mean[k], atol=stderr(len(x)) + 0.02, rtol=0)
        torch.testing.assert_close(x.T.cov(), law.covariance[k], atol=stderr(len(x), 1.4) + 0.03, rtol=0)


def test_dpm_solver_in_ten_steps_is_closer_than_ddim_in_fifty() -> None:
    """To the exact covariance given the class; the category's own steps are the same."""
    process = diffusion()
    law = MixedLaw(process)
    given = {"sex": torch.full((4000,), 1)}
    off = {}
    for solver, steps in (("ddim", 50), ("dpm", 10)):
        options: dict[str, Any] = {"steps": steps, "stride": 1000, "conditioning": "clean", "solver": solver}
        drawn = sample(law, process, given, generators(4000, solver), **options)
        spread = flat(drawn).std(0) / law.covariance[1].diagonal().sqrt()
        off[solver] = (spread - 1).abs().max().item()
    assert off["dpm"] < min(off["ddim"], 0.05)


def test_guidance_moves_the_answer_away_from_the_unconditional_one() -> None:
    """On the line from E[x_0] through E[x_0 | given]: at w = 1 it is where it was, beyond it goes beyond."""
    process = diffusion()
    law = MixedLaw(process)
    given = {"sex": torch.full((500,), 2)}
    means = {}
    for w in (1.0, 2.0):
        drawn = sample(law, process, given, generators(500), conditioning="clean", guidance=w)
        assert torch.equal(drawn["sex"], given["sex"])
        means[w] = flat(drawn).mean(0)
    centre = law.prior @ law.mean
    beyond = (means[2.0] - centre) / (means[1.0] - centre)
    assert (beyond > 1.2).all()


@pytest.mark.parametrize("name", ["image", "age", "sex"])
def test_clean_conditionals_are_the_exact_ones(name: str) -> None:
    process = diffusion()
    law = MixedLaw(process)
    person = {key: value for key, value in law.draw(1, seed=4).items() if key == name}
    drawn = sample(law, process, repeated(person, N), generators(N, name), conditioning="clean", **FINE)
    if name == "sex":
        k = int(person["sex"])
        p, mean, covariance, rest = law.prior * 0 + 1 / 3, law.mean[[k] * 3], law.covariance[[k] * 3], [0, 1, 2]
    else:
        dims = [0, 1] if name == "image" else [2]
        x = torch.cat([v.flatten() for v in person.values()]).double()
        p, mean, covariance = law.given(x, dims)
        rest = [i for i in range(3) if i not in dims]
        torch.testing.assert_close(one_hot_share(drawn["sex"]), p, atol=stderr(N, 0.5) + 0.01, rtol=0)
    centre, spread = mixture(p, mean, covariance)
    x = flat(drawn)[:, rest]
    torch.testing.assert_close(x.mean(0), centre, atol=stderr(N, float(spread.max()) ** 0.5) + 0.02, rtol=0)
    torch.testing.assert_close(x.T.cov().reshape(spread.shape), spread, atol=stderr(N, 1.4) + 0.03, rtol=0)


def test_what_is_neither_given_nor_wanted_is_left_alone() -> None:
    """Chains of age given the class rest the image at t = T, and draw the exact conditional all the same."""
    process = diffusion()
    law = MixedLaw(process)
    seen: set[int] = set()

    def watched(z: dict[str, Tensor], t: dict[str, Tensor], want: list[str]) -> Any:
        assert want == ["age"]
        seen.update(t["image"].tolist())
        return law(z, t, want)

    given = {"sex": torch.full((N,), 1)}
    drawn = sample(watched, process, given, generators(N, "idle"), conditioning="clean", want=["age"], **FINE)
    assert list(drawn) == ["age"] and seen == {process.steps}
    age, spread = drawn["age"][:, 0].double(), float(law.covariance[1, 2, 2]) ** 0.5
    assert age.mean().item() == pytest.approx(float(law.mean[1, 2]), abs=stderr(N, spread) + 0.02)
    assert age.std().item() == pytest.approx(spread, rel=0.03)
    few = {"sex": given["sex"][:5]}
    painted = sample(law, process, few, generators(5), want=["age", "sex"], steps=4, stride=250)
    assert list(painted) == ["age", "sex"] and torch.equal(painted["sex"], few["sex"])


def test_repaint_leans_to_the_given_value_and_clean_reaches_it() -> None:
    """Repaint is biased towards the unconditional law; here it goes about half the way."""
    process = diffusion()
    law = MixedLaw(process)
    person = {"image": torch.tensor([-2.0, 1.2]).reshape(1, 1, 2, 1, 1)}
    p, mean, _ = law.given(person["image"].flatten().double(), [0, 1])
    exact, prior = float(p @ mean), float(law.prior @ law.mean[:, 2])
    reached = {}
    for conditioning in ("repaint", "clean"):
        drawn = sample(law, process, repeated(person, 1000), generators(1000, 1), conditioning=conditioning)
        reached[conditioning] = (drawn["age"].mean().item() - prior) / (exact - prior)
    assert 0.25 < reached["repaint"] < 0.75
    assert reached["clean"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("conditioning", ["repaint", "clean"])
def test_given_values_come_out_bit_for_bit(conditioning: str) -> None:
    process, n = diffusion(), 6
    given = MixedLaw(process).draw(n, seed=1)
    mask = torch.tensor([True, False]).reshape(1, 1, 2, 1, 1).expand(n, 1, 2, 1, 1)
    there = torch.arange(n) % 2 == 0
    options: dict[str, Any] = {"steps": 4, "stride": 250, "conditioning": conditioning}
    for names in (["image"], ["age", "sex"], ["image", "age", "sex"]):
        some = {name: given[name] for name in names}
        drawn = sample(network(), process, some, generators(n), **options)
        assert all(torch.equal(drawn[name], given[name]) for name in names)
    drawn = sample(network(), process, given, generators(n), mask={"image": mask}, present={"age": there}, **options)
    assert torch.equal(drawn["image"][mask], given["image"][mask])
    assert not (drawn["image"] == given["image"])[~mask].any()
    assert torch.equal(drawn["age"][there], given["age"][there])
    assert not (drawn["age"] == given["age"])[~there].any()


@pytest.mark.parametrize("conditioning", ["repaint", "clean"])
def test_a_row_does_not_depend_on_its_batch(conditioning: str) -> None:
    """Also where some rows have a given value and others lack it."""
    process, net, n = diffusion(), network(), 5
    given = {name: value for name, value in MixedLaw(process).draw(n, seed=2).items() if name != "image"}
    present = {
        "age": torch.tensor([True, False, True, True, False]),
        "sex": torch.tensor([True, True, False] + [True] * 2),
    }
    options: dict[str, Any] = {"steps": 4, "stride": 125, "conditioning": conditioning}
    together = sample(net, process, given, generators(n, 7), present=present, **options)
    for i in range(n):
        row = {name: value[i : i + 1] for name, value in given.items()}
        there = {name: rows[i : i + 1] for name, rows in present.items()}
        alone = sample(net, process, row, generators(n, 7)[i : i + 1], present=there, **options)
        for name in VARIABLES.names:
            torch.testing.assert_close(alone[name], together[name][i : i + 1], atol=1e-4, rtol=1e-4)


def test_a_lacking_value_is_the_same_as_one_not_given() -> None:
    process, net = diffusion(), network()
    given = MixedLaw(process).draw(3, seed=3)
    nobody = {"age": torch.zeros(3, dtype=torch.bool)}
    sex, both = {"sex": given["sex"]}, {"age": given["age"], "sex": given["sex"]}
    without = sample(net, process, sex, generators(3, 8), steps=4, stride=250)
    lacking = sample(net, process, both, generators(3, 8), steps=4, stride=250, present=nobody)
    assert all(torch.equal(without[name], lacking[name]) for name in VARIABLES.names)


@pytest.mark.parametrize("conditioning", ["repaint", "clean"])
def test_masked_inpainting_follows_what_is_known(conditioning: str) -> None:
    """One voxel known, the other drawn: on the side of its exact conditional mean."""
    process = diffusion()
    law = MixedLaw(process)
    mask = torch.tensor([True, False]).reshape(1, 1, 2, 1, 1).expand(500, 1, 2, 1, 1)
    reached = []
    for first in (-1.5, 1.5):
        person = {"image": torch.tensor([first, 99.0]).reshape(1, 1, 2, 1, 1)}  # 99: unknown, must have no effect
        drawn = sample(
            law, process, repeated(person, 500), generators(500), mask={"image": mask}, conditioning=conditioning
        )
        p, mean, _ = law.given(torch.tensor([first]).double(), [0])
        reached.append((drawn["image"][:, 0, 1].mean().item(), float(p @ mean[:, 0])))
    (low, exact_low), (high, exact_high) = reached
    assert (high - low) / (exact_high - exact_low) == pytest.approx(1.0, abs=0.35)


def test_what_cannot_be_done_is_refused() -> None:
    given = MixedLaw(diffusion()).draw(2, seed=1)
    with pytest.raises(ValueError, match="need a model trained with independent times"):
        sample(network(), diffusion("shared"), {"age": given["age"]}, generators(2), conditioning="clean")
    with pytest.raises(ValueError, match="conditioning 'clean' and guidance need"):
        sample(network(), diffusion("shared"), {"age": given["age"]}, generators(2), guidance=2.0)
    for guidance in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            sample(network(), diffusion(), {"age": given["age"]}, generators(2), guidance=guidance)
    with pytest.raises(ValueError, match="Did you mean 'dpm'"):
        sample(network(), diffusion(), {}, generators(2), solver="dmp")
    with pytest.raises(ValueError, match="Did you mean 'clean'"):
        sample(network(), diffusion(), given, generators(2), conditioning="cleen")
    with pytest.raises(KeyError, match="Did you mean 'age'"):
        sample(network(), diffusion(), {"agee": given["age"]}, generators(2))
    with pytest.raises(ValueError, match="mask of image, which is not given"):
        sample(network(), diffusion(), {}, generators(2), mask={"image": torch.ones(2, 1, 2, 1, 1)})
    with pytest.raises(ValueError, match="which is no volume"):
        sample(network(), diffusion(), given, generators(2), mask={"age": torch.ones(2, 1)})
