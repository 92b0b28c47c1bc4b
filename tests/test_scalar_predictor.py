"""Laws of the 3D encoders of scalars and their heads."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvhpc.config import EncoderConfig
from mvhpc.models.scalar_predictor import FixedNorm, Halve, ScalarPredictor
from mvhpc.models.scalar_stack import MASKED, build_encoders
from mvhpc.variables import Variables
from tests.networks import perturb
from tests.test_denoiser import variables


def model(v: Variables, members: int = 1) -> ScalarPredictor:
    """With nothing at its initial zeros."""
    torch.manual_seed(0)
    settings = EncoderConfig(spacing=4.0, ensemble_members=members, components=2, channels=[8, 16], embedding=16)
    network = build_encoders(v, settings)
    perturb(network)
    return network


def inputs(v: Variables, n: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of n people, and levels: age and site are unknown in some rows."""
    g = torch.Generator().manual_seed(1)
    z = {x.name: torch.randn(n, *x.shape, generator=g) for x in v.volumes}
    z |= {"age": torch.randn(n, 1, generator=g), "site": torch.randint(3, (n,), generator=g)}
    t = {name: MASKED * torch.randint(2, (n,), generator=g) for name in ("age", "site")}
    return z, {x.name: torch.zeros(n, dtype=torch.int64) for x in v.volumes} | t


def test_one_encoding_of_the_volumes_serves_every_query() -> None:
    """It depends neither on the values of scalars nor on whether they are known."""
    v = variables()
    z, t = inputs(v)
    other = {"age": -z["age"], "site": (z["site"] + 1) % 3}
    net = model(v)
    whole = net(z, t)
    features = net.encode({**z, **other}, {**t, "age": MASKED - t["age"], "site": MASKED - t["site"]})
    for name, x in net.predict(features, z, t, ["age", "site"]).items():
        assert torch.equal(x, whole[name])


def test_several_queries_of_a_row_are_rows_of_one_volume() -> None:
    v = variables()
    z, t = inputs(v, 2)
    more, levels = inputs(v, 6)
    net = model(v)
    ours = net({**more, "v0": z["v0"]}, {**levels, "v0": t["v0"]})
    rows = net({**more, "v0": z["v0"].repeat_interleave(3, 0)}, {**levels, "v0": t["v0"].repeat_interleave(3)})
    for name in ("age", "site"):
        torch.testing.assert_close(ours[name], rows[name])


def test_values_that_are_unknown_have_no_effect() -> None:
    v = variables()
    z, t = inputs(v, 20)
    net = model(v)
    moved = {"v0": z["v0"], "age": z["age"] + t["age"][:, None], "site": (z["site"] + t["site"]) % 3}
    for name, x in net(moved, t).items():
        assert torch.equal(x, net(z, t)[name])


def test_every_layer_of_the_encoder_starts_with_standardised_inputs_and_sees_nothing_unknown() -> None:
    v = variables()
    z, t = inputs(v, 50)
    net = model(v)
    clean, unknown = ({**t, "v0": torch.full((50,), level)} for level in (0, MASKED))
    net.standardize_features({"v0": z["v0"]})
    found: list[Tensor] = []
    for part in net.encoders.modules():
        if isinstance(part, FixedNorm):
            part.register_forward_hook(lambda *call: found.append(call[2].transpose(0, 1).flatten(1)))
    net.encode(z, clean)
    assert len(found) == 3
    for x in found:
        mean, sd = x.mean(1), x.std(1)
        assert mean.abs().max() < 1e-4
        assert ((sd - 1).abs() < 1e-3).logical_or(sd == 0).all() and sd.any()  # 0: a channel that ReLU empties
    assert not net.encode(z, unknown).any()


@pytest.mark.parametrize("size", [(4, 6, 2), (5, 3, 1)])
def test_halving_is_max_pooling(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size)
    assert torch.equal(Halve()(x).relu(), F.max_pool3d(x, 2, ceil_mode=True).relu())


def test_ensemble_members_are_independent() -> None:
    """Each predicts what it predicts alone, and the weights of one change no prediction of another."""
    v = variables()
    z, t = inputs(v)
    net = model(v, members=3)
    predictions = net(z, t)
    for member in range(3):
        alone = model(v)
        state = {
            re.sub(r"^(\w+)\.\d+\.", r"\1.0.", name): value
            for name, value in net.state_dict().items()
            if name.split(".")[1] == str(member)
        }
        alone.load_state_dict(state)
        single = alone(z, t)
        for name in ("age", "site"):
            torch.testing.assert_close(predictions[name][:, member], single[name][:, 0])
    assert not torch.allclose(predictions["age"][:, 0], predictions["age"][:, 1])
