"""Laws of the network: padding is invisible, its parts agree with the whole, and it learns a known joint law."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mvhpc.diffusion.density import density
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.posterior import Posterior
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.joint_network import JointNetwork, build_networks
from mvhpc.models.layers import sinusoid
from mvhpc.models.scalar_predictor import FixedNorm, Halve
from mvhpc.variables import Categorical, Continuous, Variables, Volume
from tests.conftest import DIFFUSION
from tests.networks import joint, parts, perturbed, predictor, settings

DESIGNS = pytest.mark.parametrize("design", ["late", "early"])
AGE, SITE = Continuous("age", 0, 100), Categorical("site", ("a", "b", "c"))


def variables(size: tuple[int, int, int] = (4, 4, 4), channels: tuple[int, ...] = (2,)) -> Variables:
    volumes = [Volume(f"v{i}", (c, *size)) for i, c in enumerate(channels)]
    return Variables([*volumes, AGE, SITE])


def model(
    v: Variables, design: str = "late", checkpointing: bool = False, masked_level: int | None = None, members: int = 1
) -> JointNetwork:
    return perturbed(v, settings(design, members, checkpointing=checkpointing), masked_level)


def parameters(net: JointNetwork) -> list[nn.Parameter]:
    return [p for part in parts(net) for p in part.parameters()]


def inputs(v: Variables, n: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    z = {x.name: torch.randn(n, *x.shape, generator=g) for x in v.volumes}
    z |= {"age": torch.randn(n, 1, generator=g), "site": torch.randint(3, (n,), generator=g)}
    return z, {name: torch.randint(1001, (n,), generator=g) for name in v.names}


@DESIGNS
def test_sizes_that_the_strides_do_not_divide_are_padded_with_zeros_and_cropped(design: str) -> None:
    odd, even = variables((3, 4, 1)), variables((4, 4, 2))
    z, t = inputs(odd)
    padded = {**z, "v0": torch.nn.functional.pad(z["v0"], (0, 1, 0, 0, 0, 1))}
    ours, theirs = model(odd, design)(z, t), model(even, design)(padded, t)
    torch.testing.assert_close(ours["v0"], theirs["v0"][:, :, :3, :4, :1])
    if design == "early":
        torch.testing.assert_close(ours["age"], theirs["age"])


def test_several_volumes_leave_by_the_channels_they_entered() -> None:
    """Two volumes of one and two channels are one of three, split."""
    two, one = variables(channels=(1, 2)), variables(channels=(3,))
    z, t = inputs(two)
    net, whole = model(two), model(one)
    joined = {"v0": torch.cat([z["v0"], z["v1"]], 1), "age": z["age"], "site": z["site"]}
    ours, theirs = net.denoiser, whole.denoiser
    theirs.time, theirs.up_time = (nn.Sequential(Twice(16), layers) for layers in (ours.time, ours.up_time))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith(("time", "up_time"))}
    theirs.load_state_dict(state, strict=False)
    assert net.scalars is not None and whole.scalars is not None
    heads = whole.scalars.heads[0]
    heads.conditioning = nn.Sequential(Twice(16), net.scalars.heads[0].conditioning)
    state = {k: v for k, v in net.scalars.state_dict().items() if not k.startswith("heads.0.conditioning")}
    whole.scalars.load_state_dict(state, strict=False)
    t["v1"] = t["v0"]
    split, single = net(z, t), whole(joined, {k: t[k] for k in ("v0", "age", "site")})
    torch.testing.assert_close(torch.cat([split["v0"], split["v1"]], 1), single["v0"])
    torch.testing.assert_close(split["age"], single["age"])
    assert split["v0"].shape == (3, 1, 4, 4, 4)


class Twice(torch.nn.Module):
    """Repeats the last of the conditioning, the level of the only volume, as if there were two of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -self.width :]], 1)


@DESIGNS
def test_scalars_alone_are_predicted_without_the_up_path(design: str) -> None:
    v = variables()
    z, t = inputs(v)
    net = model(v, design)
    whole = net(z, t)
    for block in net.denoiser.up:
        block.register_forward_pre_hook(lambda *_: pytest.fail("the up path ran"))
    part = net(z, t, want=["age", "site"])
    assert part.keys() == {"age", "site"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_one_encoding_of_the_volumes_serves_every_query() -> None:
    """It depends neither on the values of scalars nor on their levels, and needs no U-Net."""
    v = variables()
    z, t = inputs(v)
    other = {"age": -z["age"], "site": (z["site"] + 1) % 3}
    net = model(v)
    whole, scalars = net(z, t), predictor(net)
    net.denoiser.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("the U-Net ran"))
    features = scalars.encode({**z, **other}, {**t, "age": t["age"] // 2, "site": t["site"] // 3})
    for name, x in scalars.predict(features, z, t, ["age", "site"]).items():
        assert torch.equal(x, whole[name])
    net(z, t, want=["age"])
    twice = ({name: x.repeat_interleave(2, 0) for name, x in values.items()} for values in (z, t))
    for name, x in scalars.predict(features.repeat_interleave(2, 0), *twice, ["age", "site"]).items():
        torch.testing.assert_close(x, whole[name].repeat_interleave(2, 0))


def test_every_layer_of_the_encoder_starts_with_standardised_inputs_and_sees_nothing_in_noise() -> None:
    v = variables()
    z, t = inputs(v, 50)
    net = predictor(model(v, masked_level=1000))
    clean, noise = ({**t, "v0": torch.full((50,), level)} for level in (0, 1000))
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
    assert not net.encode(z, noise).any()


@pytest.mark.parametrize("size", [(4, 6, 2), (5, 3, 1)])
def test_halving_is_max_pooling(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size)
    assert torch.equal(Halve()(x).relu(), F.max_pool3d(x, 2, ceil_mode=True).relu())


def test_ensemble_members_are_independent() -> None:
    """Each predicts what it predicts alone, and the weights of one change no prediction of another."""
    v = variables()
    z, t = inputs(v)
    net = predictor(model(v, members=3))
    predictions = net(z, t)
    for member in range(3):
        alone = predictor(model(v))
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


def test_several_queries_of_a_row_are_rows_of_one_volume() -> None:
    """The predictions are those of single queries; volumes are denoised given the first."""
    v = variables()
    z, t = inputs(v, 2)
    more, levels = inputs(v, 6)
    net = model(v)
    ours = net({**more, "v0": z["v0"]}, {**levels, "v0": t["v0"]})
    rows = net({**more, "v0": z["v0"].repeat_interleave(3, 0)}, {**levels, "v0": t["v0"].repeat_interleave(3)})
    for name in ("age", "site"):
        torch.testing.assert_close(ours[name], rows[name])
    torch.testing.assert_close(ours["v0"], rows["v0"][::3])


def test_volumes_at_rest_cost_no_unet() -> None:
    """Rows whose volumes are known get zeros for them, everybody else the same values and gradients as ever."""
    v = variables(channels=(2, 1))
    z, t = inputs(v, 4)
    t |= {"v0": torch.tensor([0, 5, 0, 0]), "v1": torch.tensor([0, 0, 0, 9])}
    net = model(v)
    rows: list[int] = []
    unet = net.denoiser
    hook = unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    ours, whole = net(z, t), unet.expand(unet.contract(z, t), z, t)
    assert rows == [2, 4]
    for name in ("v0", "v1"):
        torch.testing.assert_close(ours[name][[1, 3]], whole[name][[1, 3]])
        assert not ours[name][[0, 2]].any()
    net(z, {**t, "v0": t["v0"] * 0, "v1": t["v1"] * 0})
    assert rows[2] == 1, "the same layers run at every worker"
    hook.remove()


def test_compiled_it_gives_the_same_and_is_compiled_once_for_any_number_of_moving_rows() -> None:
    """Any but one, which torch always compiles for itself."""
    torch._dynamo.reset()
    net, graphs = model(variables((3, 4, 2))).denoiser, []
    z, t = inputs(variables((3, 4, 2)), 8)
    plain = {n: net(z, {**t, "v0": torch.where(torch.arange(8) < n, t["v0"], 0)}) for n in (3, 8, 2, 5)}
    net.compile(backend="eager")
    for n, outputs in plain.items():
        compiled = net(z, {**t, "v0": torch.where(torch.arange(8) < n, t["v0"], 0)})
        for name, value in outputs.items():
            torch.testing.assert_close(compiled[name], value)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 1


@DESIGNS
def test_values_that_are_noise_are_masked(design: str) -> None:
    v = variables(channels=(2, 1))
    z, _ = inputs(v)
    at = {name: torch.tensor([1000, 1000, 999]) for name in v.names}
    net = model(v, design, masked_level=1000)
    moved = {name: (x + 1) % 3 if name == "site" else x + 1 for name, x in z.items()}
    before, after = net(z, at), net(moved, at)
    for name in v.names:
        torch.testing.assert_close(before[name][:2], after[name][:2])
        assert (before[name][2] - after[name][2]).abs().max() > 1e-5


@DESIGNS
def test_a_row_does_not_depend_on_the_others(design: str) -> None:
    v = variables()
    z, t = inputs(v, n=4)
    net = model(v, design)
    whole = net(z, t)
    alone = net({k: x[2:3] for k, x in z.items()}, {k: x[2:3] for k, x in t.items()})
    for name in v.names:
        torch.testing.assert_close(alone[name], whole[name][2:3], atol=1e-5, rtol=1e-4)


@DESIGNS
def test_every_level_and_value_reaches_every_output(design: str) -> None:
    v = variables(channels=(2, 1))
    z, t = inputs(v)
    net = model(v, design)
    before = net(z, t)
    for name in v.names:
        moved = (z[name] + 1) % 3 if name == "site" else z[name] + 1
        for after in (net({**z, name: moved}, t), net(z, {**t, name: (t[name] + 300) % 1001})):
            assert all((after[other] - before[other]).abs().max() > 1e-5 for other in v.names)


@DESIGNS
def test_checkpointing_changes_no_gradient(design: str) -> None:
    v = variables()
    z, t = inputs(v)
    gradients = []
    for checkpointing in (False, True):
        net = model(v, design, checkpointing)
        for part in parts(net):
            part.train()
        sum(x.square().sum() for x in net(z, t).values()).backward()
        gradients.append([p.grad for p in parameters(net)])
    for plain, kept in zip(*gradients):
        assert plain is not None  # no parameter is idle
        torch.testing.assert_close(plain, kept)


def test_untrained_networks_predict_zero_even_odds_and_a_broad_density() -> None:
    v = variables()
    z, t = inputs(v)
    outputs = joint(build_networks(v, settings(components=4)))(z, t)
    assert all((x == 0).all() for x in (outputs["v0"], outputs["site"], outputs["age"][..., 0]))
    broad = density(outputs["age"])
    assert broad.mean.abs().max() < 1e-6 and (broad.stddev > 0.9).all()


def test_levels_are_distinct() -> None:
    waves = sinusoid(torch.arange(1001), 32)
    distance = torch.cdist(waves, waves) + torch.eye(1001)
    assert distance.min() > 0.1


def test_schemas_without_scalars_and_without_volumes() -> None:
    alone = Variables([Volume("v0", (2, 4, 4, 4))])
    networks = build_networks(alone, settings())
    assert networks.keys() == {"denoiser"}
    z = torch.randn(2, 2, 4, 4, 4)
    assert joint(networks)({"v0": z}, {"v0": torch.tensor([3, 900])})["v0"].shape == z.shape
    with pytest.raises(ValueError, match="at least one volume"):
        JointDenoiser(Variables([AGE, SITE]), settings(channels=[8], attention=[False]))
    sizes = Variables([Volume("a", (2, 4, 4, 4)), Volume("b", (2, 4, 4, 2))])
    with pytest.raises(ValueError, match="of one size"):
        JointDenoiser(sizes, settings(channels=[8], attention=[False]))


@pytest.mark.slow
def test_it_learns_a_joint_law() -> None:
    """Age and class written into a noisy image: one call at t = T finds them almost as well as Bayes' rule does."""
    v = Variables([Volume("image", (1, 2, 2, 2)), AGE, Categorical("sex", ("F", "M"))])
    process = JointDiffusion(
        v, dataclasses.replace(DIFFUSION, shared_fraction=0.2, clean_fraction=0.3, noise_fraction=0.3)
    )
    g = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 1, 2, 2, 2, generator=g)
    pattern *= 2 / pattern.flatten(1).norm(dim=1).reshape(2, 1, 1, 1, 1)
    sd, n = 0.3, 64

    def people(n: int) -> dict[str, Tensor]:
        age, sex = torch.randn(n, 1, generator=g), torch.randint(2, (n,), generator=g)
        both = torch.stack([age[:, 0], 2.0 * sex - 1], 1)
        image = torch.einsum("bi,ichwd->bchwd", both, pattern) + torch.randn(n, 1, 2, 2, 2, generator=g)
        return {"image": image, "age": sd * age, "sex": sex}

    def streams(n: int) -> list[torch.Generator]:
        seeds = torch.randint(2**62, (n,), generator=g).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    torch.manual_seed(0)
    widths = {"channels": [16, 16], "head_channels": 16, "norm_groups": 1, "embedding": 32}
    small = settings(components=4, attention=[False, False], **widths)
    net = joint(build_networks(v, small, process.masked_level))
    predictor(net).standardize_features({"image": people(256)["image"]})
    optimizer = torch.optim.AdamW(parameters(net), 3e-3)
    steps, queries = 300, 4
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = streams(n * queries)
        noised = process.noise(people(n), {}, process.draw_times(rows), rows)
        loss = process.total(process.losses(net(noised.z, noised.t), noised)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test = people(1000)
    with torch.no_grad():
        laws = Posterior(predictor(net), process, {"image": test["image"]}, 1000).laws(["age", "sex"])
    age, truth = laws["age"], test["age"][:, 0].double()
    error = (age.mean - truth).square().mean().sqrt() / sd  # Bayes-optimal: 1 / sqrt(1 + 2^2) = 0.45; the mean: 1
    right = (laws["sex"].argmax(1) == test["sex"]).double().mean()  # Bayes-optimal: 0.97; guessing: 0.5
    assert error < 0.6
    assert 0.35 < age.stddev.mean() / sd < 0.6
    assert right > 0.93
