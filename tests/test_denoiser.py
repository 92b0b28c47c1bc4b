"""Laws of the U-Net: padding is invisible, its parts agree with the whole, and it learns a known joint law."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.layers import sinusoid
from mvhpc.variables import Categorical, Continuous, Variables, Volume
from tests.conftest import DIFFUSION
from tests.networks import perturbed, settings

DESIGNS = pytest.mark.parametrize("design", ["late", "early"])
AGE, SITE = Continuous("age", 0, 100), Categorical("site", ("a", "b", "c"))


def variables(size: tuple[int, int, int] = (4, 4, 4), channels: tuple[int, ...] = (2,)) -> Variables:
    volumes = [Volume(f"v{i}", (c, *size)) for i, c in enumerate(channels)]
    return Variables([*volumes, AGE, SITE])


def model(
    v: Variables, design: str = "late", checkpointing: bool = False, masked_level: int | None = None
) -> JointDenoiser:
    return perturbed(v, settings(design, checkpointing=checkpointing), masked_level)


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
    whole.time, whole.up_time = (nn.Sequential(Twice(16), layers) for layers in (net.time, net.up_time))
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(("time", "up_time"))}
    whole.load_state_dict(state, strict=False)
    t["v1"] = t["v0"]
    split, single = net(z, t), whole(joined, {k: t[k] for k in ("v0", "age", "site")})
    torch.testing.assert_close(torch.cat([split["v0"], split["v1"]], 1), single["v0"])
    assert split["v0"].shape == (3, 1, 4, 4, 4)


class Twice(torch.nn.Module):
    """Repeats the last of the conditioning, the level of the only volume, as if there were two of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -self.width :]], 1)


def test_scalars_alone_are_predicted_without_the_up_path() -> None:
    v = variables()
    z, t = inputs(v)
    net = model(v, "early")
    whole = net(z, t)
    for block in net.up:
        block.register_forward_pre_hook(lambda *_: pytest.fail("the up path ran"))
    part = net(z, t, want=["age", "site"])
    assert part.keys() == {"age", "site"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


@DESIGNS
def test_values_that_are_noise_are_masked(design: str) -> None:
    v = variables(channels=(2, 1))
    z, _ = inputs(v)
    at = {name: torch.tensor([1000, 1000, 999]) for name in v.names}
    net = model(v, design, masked_level=1000)
    moved = {name: (x + 1) % 3 if name == "site" else x + 1 for name, x in z.items()}
    before, after = net(z, at), net(moved, at)
    for name in net.outputs:
        torch.testing.assert_close(before[name][:2], after[name][:2])
        assert (before[name][2] - after[name][2]).abs().max() > 1e-5


@DESIGNS
def test_a_row_does_not_depend_on_the_others(design: str) -> None:
    v = variables()
    z, t = inputs(v, n=4)
    net = model(v, design)
    whole = net(z, t)
    alone = net({k: x[2:3] for k, x in z.items()}, {k: x[2:3] for k, x in t.items()})
    for name in net.outputs:
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
            assert all((after[other] - before[other]).abs().max() > 1e-5 for other in net.outputs)


@DESIGNS
def test_checkpointing_changes_no_gradient(design: str) -> None:
    v = variables()
    z, t = inputs(v)
    gradients = []
    for checkpointing in (False, True):
        net = model(v, design, checkpointing)
        net.train()
        sum(x.square().sum() for x in net(z, t).values()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, kept in zip(*gradients):
        assert plain is not None  # no parameter is idle
        torch.testing.assert_close(plain, kept)


@DESIGNS
def test_an_untrained_network_predicts_zero_and_even_odds(design: str) -> None:
    v = variables()
    outputs = JointDenoiser(v, settings(design))(*inputs(v))
    assert all(not x.any() for x in outputs.values())
    assert outputs.keys() == (set(v.names) if design == "early" else {"v0"})


def test_levels_are_distinct() -> None:
    waves = sinusoid(torch.arange(1001), 32)
    distance = torch.cdist(waves, waves) + torch.eye(1001)
    assert distance.min() > 0.1


def test_schemas_without_scalars_and_without_volumes() -> None:
    alone = Variables([Volume("v0", (2, 4, 4, 4))])
    z = torch.randn(2, 2, 4, 4, 4)
    assert JointDenoiser(alone, settings())({"v0": z}, {"v0": torch.tensor([3, 900])})["v0"].shape == z.shape
    with pytest.raises(ValueError, match="at least one volume"):
        JointDenoiser(Variables([AGE, SITE]), settings(channels=[8], attention=[False]))
    sizes = Variables([Volume("a", (2, 4, 4, 4)), Volume("b", (2, 4, 4, 2))])
    with pytest.raises(ValueError, match="of one size"):
        JointDenoiser(sizes, settings(channels=[8], attention=[False]))


@pytest.mark.slow
def test_it_learns_what_scalars_do_to_a_volume() -> None:
    """Age and class add patterns to a noisy image: one call at t = T finds their sum, and nothing where both are
    unknown."""
    v = Variables([Volume("image", (1, 2, 2, 2)), AGE, Categorical("sex", ("F", "M"))])
    process = JointDiffusion(
        v, dataclasses.replace(DIFFUSION, shared_fraction=0.0, clean_fraction=0.4, noise_fraction=0.3)
    )
    g = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 1, 2, 2, 2, generator=g)

    def people(n: int) -> tuple[dict[str, Tensor], Tensor]:
        age, sex = torch.randn(n, 1, generator=g), torch.randint(2, (n,), generator=g)
        mean = torch.einsum("bi,ichwd->bchwd", torch.stack([age[:, 0], 2.0 * sex - 1], 1), pattern)
        return {"image": mean + torch.randn(n, 1, 2, 2, 2, generator=g), "age": age, "sex": sex}, mean

    torch.manual_seed(0)
    widths = {"channels": [16, 16], "head_channels": 16, "norm_groups": 1, "embedding": 32}
    net = JointDenoiser(v, settings(attention=[False, False], **widths), process.masked_level)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        seeds = torch.randint(2**62, (64,), generator=g).tolist()
        rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        noised = process.noise(people(64)[0], {}, process.draw_times(rows, volumes_move=True), rows)
        loss = process.total(process.losses(net(noised.z, noised.t), noised)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test, mean = people(500)
    z = {**test, "image": torch.randn(500, 1, 2, 2, 2, generator=g)}
    for level, truth in ((0, mean), (1000, torch.zeros_like(mean))):
        t = {name: torch.full((500,), 1000 if name == "image" else level) for name in v.names}
        with torch.no_grad():
            found = process.predict(v["image"], net(z, t)["image"], z["image"], t["image"])
        assert (found - truth).square().mean() < 0.15 * mean.square().mean()
