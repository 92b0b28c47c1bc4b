"""Laws of densities and of the posterior: closed forms, round trips, and an exact answer for every query."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from mvhpc.diffusion.categorical import probabilities
from mvhpc.diffusion.density import crps, density, quantile
from mvhpc.diffusion.posterior import Posterior
from mvhpc.training.calibration import calibrate
from tests.mixed_law import K, MixedLaw, diffusion, mixture, one_hot_share, stderr


def law(weights: list[float], means: list[float], sds: list[float]) -> MixtureSameFamily:
    w, m, s = (torch.tensor([x], dtype=torch.float64) for x in (weights, means, sds))
    return MixtureSameFamily(Categorical(w), Normal(m, s))


TWO = law([0.3, 0.7], [-1.0, 2.0], [0.5, 1.5])


def test_outputs_are_read_as_offsets_from_what_v_says_of_x0() -> None:
    """At t = T v is -x_0: a single component without offset is centred there; x0 is itself."""
    output = torch.tensor([[-1.5, 0.0, 0.0, math.log(0.2)]])
    one = density(output)
    assert one.mean.item() == pytest.approx(1.5) and one.stddev.item() == pytest.approx(0.2)
    shifted = density(torch.tensor([[-1.5, 5.0, 5.0, -1.0, 3.0, 0.0, 0.0]]))
    assert shifted.mean.item() == pytest.approx(1.5 + 1.0)
    assert density(output, "x0").mean.item() == pytest.approx(-1.5)


def test_predictions_of_ensemble_members_are_mixed_in_equal_parts() -> None:
    """However sure one of them is of itself; a temperature stretches the mixture about its mean."""
    output = torch.randn(5, 3, 1 + 3 * 2, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-4, 4, 9)[:, None]
    together, apart = density(output), [density(output[:, member]) for member in range(3)]
    torch.testing.assert_close(together.cdf(x), torch.stack([law.cdf(x) for law in apart]).mean(0))
    wide = density(output, temperature=2.0)
    torch.testing.assert_close(wide.mean, together.mean)
    torch.testing.assert_close(wide.stddev, 2 * together.stddev)
    logits = torch.randn(5, 3, K, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(probabilities(logits, 2.0), (logits / 2).softmax(-1).mean(1))


def test_quantiles_invert_the_distribution_function() -> None:
    p = torch.tensor([1e-4, 0.05, 0.5, 0.95, 1 - 1e-4], dtype=torch.float64)
    assert TWO.cdf(quantile(TWO, p).T).T.flatten().tolist() == pytest.approx(p.tolist(), abs=1e-9)


@pytest.mark.parametrize("x", [-2.0, 0.4, 3.0])
def test_crps_is_the_integral_that_defines_it(x: float) -> None:
    def squared(y: float) -> float:
        return (float(TWO.cdf(torch.tensor([y], dtype=torch.float64))) - (y >= x)) ** 2

    integral = quad(squared, -20, x, limit=200)[0] + quad(squared, x, 20, limit=200)[0]
    assert crps(TWO, torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(integral, rel=1e-5)


class Answers:
    """The law's exact answers about scalars, as a network's output; what it sees is the image and its level."""

    components = K

    def __init__(self, law: MixedLaw, sure: float = 1.0) -> None:
        self.law, self.looked, self.sure = law, 0, sure  # times surer than it should be

    def encode(self, z: dict[str, Tensor], t: dict[str, Tensor]) -> Tensor:
        self.looked += 1
        return torch.cat([z["image"].flatten(1), t["image"][:, None]], 1)

    def predict(
        self, features: Tensor, z: dict[str, Tensor], t: dict[str, Tensor], want: list[str]
    ) -> dict[str, Tensor]:
        shown = torch.stack([features[:, -1] == 0, t["age"] == 0], 1)
        x = torch.cat([features[:, :-1], z["age"]], 1).double()
        output = {name: torch.zeros(len(x), K if name == "sex" else 1 + 3 * K).double() for name in want}
        for pattern in shown.unique(dim=0).tolist():
            rows = (shown == torch.tensor(pattern)).all(1)
            dims = [i for places, known in zip(([0, 1], [2]), pattern) for i in places if known]
            chances, mean, covariance = self.law.given(x[rows][:, dims], dims)
            chances = torch.where((t["sex"][rows] == 0)[:, None], F.one_hot(z["sex"][rows], K), chances)
            log = chances.clamp(min=1e-30).log()
            for name in want:
                if name == "sex":
                    output[name][rows] = log * self.sure
                else:
                    logs = (covariance[:, -1, -1].sqrt() / self.sure).log().expand(len(log), K)
                    output[name][rows] = torch.cat([torch.zeros(len(log), 1), log, mean[..., -1], logs], 1)
        return output


def posterior_of(
    given: list[str], present: dict[str, Tensor] | None = None
) -> tuple[Posterior, MixedLaw, dict[str, Tensor]]:
    law = MixedLaw(diffusion())
    person = law.draw(2, 1)
    network = Answers(law)
    posterior = Posterior(network, law.diffusion, {name: person[name] for name in given}, 2, present)
    return posterior, law, person


def test_what_is_missing_in_a_row_is_unknown_there() -> None:
    some, _, _ = posterior_of(["image", "sex"], {"image": torch.tensor([True, False])})
    whole, none = posterior_of(["image", "sex"])[0], posterior_of(["sex"])[0]
    mean, full, without = (p.laws(["age"])["age"].mean for p in (some, whole, none))
    assert mean[0] == full[0] and mean[1] == without[1]


@pytest.mark.parametrize("order", [["age", "sex"], ["sex", "age"]])
def test_joint_draws_follow_the_joint_law_in_any_order(order: list[str]) -> None:
    posterior, law, person = posterior_of(["image"])
    n = 4000
    uniform = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = posterior.draw(order, uniform)
    age, sex = drawn["age"].reshape(2, n), drawn["sex"].reshape(2, n)
    for row in range(2):
        chances, mean, covariance = law.given(person["image"][row].flatten().double(), [0, 1])
        assert (one_hot_share(sex[row]) - chances).abs().max() < stderr(n, 0.5)
        for k in range(K):
            ages = age[row][sex[row] == k].double()
            if len(ages) > 100:
                assert abs(ages.mean() - mean[k, 0]) < stderr(len(ages), covariance[k, 0, 0].sqrt())
        centre, spread = mixture(chances, mean, covariance)
        posterior_law = posterior.laws(["age"])["age"]
        assert posterior_law.mean[row].item() == pytest.approx(centre.item(), abs=1e-4)
        assert posterior_law.variance[row].item() == pytest.approx(spread.item(), rel=1e-4)


def test_one_pass_of_the_encoder_serves_every_query() -> None:
    posterior, _, _ = posterior_of(["image"])
    posterior.laws(["age"])
    posterior.draw(["age", "sex"], torch.full((2, 3, 2), 0.5, dtype=torch.float64))
    assert posterior.denoiser.looked == 1  # type: ignore[attr-defined]


def test_calibration_uses_the_member_that_is_held_out() -> None:
    """Of two members, one overconfident, only the one that was not trained on a person counts."""
    law = MixedLaw(diffusion())
    right, sure = Answers(law), Answers(law, 2.5)
    network = Answers(law)
    network.predict = lambda *query: {  # type: ignore[method-assign]
        name: torch.stack([x, sure.predict(*query)[name]], 1) for name, x in right.predict(*query).items()
    }
    clean, held_out = law.draw(300, 3), torch.zeros(300, 2, dtype=torch.bool)
    everybody = {name: torch.ones(300, dtype=torch.bool) for name in clean}
    for member, alone in enumerate((right, sure)):
        held_out[:] = torch.arange(2) == member
        factors = calibrate(network, law.diffusion, clean, everybody, held_out)
        assert factors == calibrate(alone, law.diffusion, clean, everybody, torch.ones(300, 1).bool())


@pytest.mark.parametrize("sure", [1.0, 2.5])
def test_calibration_finds_how_much_too_sure_a_model_is(sure: float) -> None:
    law = MixedLaw(diffusion())
    everybody = {name: torch.ones(300, dtype=torch.bool) for name in law.diffusion.variables.names}
    factors = calibrate(Answers(law, sure), law.diffusion, law.draw(300, 3), everybody, torch.ones(300, 1).bool())
    assert factors["sex"] == pytest.approx(sure, rel=0.25)
    # an age between classes does not narrow with its parts
    assert factors["age"] == pytest.approx(sure, rel=0.25) if sure == 1 else 1.2 < factors["age"] < sure


def test_a_few_people_move_calibration_little_and_nobody_not_at_all() -> None:
    law = MixedLaw(diffusion())
    clean = law.draw(3, 3)
    present = {name: torch.ones(3, dtype=torch.bool) for name in clean}
    held_out = torch.ones(3, 1, dtype=torch.bool)
    factors = calibrate(Answers(law), law.diffusion, clean, present, held_out)
    assert all(0.4 < factor < 2.5 for factor in factors.values())
    assert calibrate(Answers(law), law.diffusion, clean, present | {"image": ~present["image"]}, held_out) == {}


def test_temperature_widens_answers_from_volumes_alone() -> None:
    law = MixedLaw(diffusion())
    person = law.draw(1, 1)
    wide = Posterior(Answers(law), law.diffusion, {"image": person["image"]}, 1, temperature={"age": 2.0}).laws(["age"])
    plain = Posterior(Answers(law), law.diffusion, {"image": person["image"]}, 1).laws(["age"])
    assert wide["age"].mean.item() == pytest.approx(plain["age"].mean.item())
    assert wide["age"].stddev.item() == pytest.approx(2 * plain["age"].stddev.item())
    unconditional = [
        Posterior(Answers(law), law.diffusion, {}, 1, temperature=s).laws(["age"])["age"] for s in ({"age": 2.0}, {})
    ]
    assert unconditional[0].stddev == unconditional[1].stddev


def test_models_without_a_posterior_say_why() -> None:
    network = Answers(MixedLaw(diffusion()))
    for process in (diffusion("shared"), diffusion(kind="eps")):
        with pytest.raises(ValueError, match="independent times and without eps"):
            Posterior(network, process, {}, 1)
    network.components = 0
    with pytest.raises(ValueError, match=r"model\.scalars"):
        Posterior(network, diffusion(), {}, 1)
