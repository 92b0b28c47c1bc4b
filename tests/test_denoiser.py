"""Laws of the network: padding is invisible, its parts agree with the whole, and it learns a known joint law."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mvhpc import config
from mvhpc.diffusion.density import density
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.posterior import Posterior
from mvhpc.models.denoiser import JointDenoiser, sinusoid
from mvhpc.variables import Categorical, Continuous, Variables, Volume

DESIGNS = pytest.mark.parametrize("design", ["late", "early"])
AGE, SITE = Continuous("age", 0, 100), Categorical("site", ("a", "b", "c"))


def variables(size: tuple[int, int, int] = (4, 4, 4), channels: tuple[int, ...] = (2,)) -> Variables:
    volumes = [Volume(f"v{i}", (c, *size)) for i, c in enumerate(channels)]
    return Variables([*volumes, AGE, SITE])


def model(
    v: Variables, design: str = "late", checkpointing: bool = False, blind: int | None = None, readers: int = 1
) -> JointDenoiser:
    """A small network with nothing at its initial zeros."""
    torch.manual_seed(0)
    components = 2 if design == "late" else 0
    settings = config.DenoiserConfig(
        design, components, readers, [8, 16], [False, True], 1, 8, 4, 16, 0.0, checkpointing
    )
    net = JointDenoiser(v, settings, blind)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


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
    whole.time, whole.up_time, whole.trunks[0].told = (
        torch.nn.Sequential(Twice(16), told) for told in (net.time, net.up_time, net.trunks[0].told)
    )
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(("time", "up_time", "trunks.0.told"))}
    whole.load_state_dict(state, strict=False)
    t["v1"] = t["v0"]
    ours, theirs = net(z, t), whole(joined, {k: t[k] for k in ("v0", "age", "site")})
    torch.testing.assert_close(torch.cat([ours["v0"], ours["v1"]], 1), theirs["v0"])
    torch.testing.assert_close(ours["age"], theirs["age"])
    assert ours["v0"].shape == (3, 1, 4, 4, 4)


class Twice(torch.nn.Module):
    """Repeats what the network is told last, the level of the only volume, as if there were two of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -self.width :]], 1)


@DESIGNS
def test_scalars_alone_are_answered_without_the_up_path(design: str) -> None:
    v = variables()
    z, t = inputs(v)
    net = model(v, design)
    whole = net(z, t)
    for block in net.up:
        block.register_forward_pre_hook(lambda *_: pytest.fail("the up path ran"))
    part = net(z, t, want=["age", "site"])
    assert part.keys() == {"age", "site"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_what_is_seen_of_volumes_serves_every_question() -> None:
    """Neither the values of scalars nor their levels reach it; nor is the U-Net needed."""
    v = variables()
    z, t = inputs(v)
    other = {"age": -z["age"], "site": (z["site"] + 1) % 3}
    net = model(v)
    seen = net.encode({**z, **other}, {**t, "age": t["age"] // 2, "site": t["site"] // 3})
    whole = net(z, t)
    net.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("the U-Net ran"))
    for name, x in net.predict(seen, z, t, ["age", "site"]).items():
        assert torch.equal(x, whole[name])
    net(z, t, want=["age"])
    twice = ({name: x.repeat_interleave(2, 0) for name, x in values.items()} for values in (z, t))
    for name, x in net.predict(seen.repeat_interleave(2, 0), *twice, ["age", "site"]).items():
        torch.testing.assert_close(x, whole[name].repeat_interleave(2, 0))


def test_the_reader_starts_with_features_of_one_scale_and_sees_nothing_in_noise() -> None:
    v = variables()
    z, t = inputs(v, 50)
    net, same = model(v, blind=1000), model(v, blind=1000)
    clean, noise = ({**t, "v0": torch.full((50,), level)} for level in (0, 1000))
    net.adapt({"v0": z["v0"]})
    same.readers[0].out = torch.nn.Identity()
    features = same.encode(z, clean)[:, 0]
    scaled = (features - features.mean(0)) / features.std(0)
    untouched = model(v).readers[0].out
    torch.testing.assert_close(net.encode(z, clean)[:, 0], untouched(scaled), rtol=1e-4, atol=1e-4)
    assert not net.encode(z, noise).any()


def test_readers_answer_each_for_itself() -> None:
    """Of several, each says what it says alone, and what one weighs moves no other's answers."""
    v = variables()
    z, t = inputs(v)
    net = model(v, readers=3)
    said = net(z, t)
    for reader in range(3):
        alone, state = model(v), net.state_dict()
        mine = {f"{part}.{reader}.": f"{part}.0." for part in ("readers", "trunks", "asked")}
        for name, value in state.items():
            part = next((old for old in mine if name.startswith(old)), None)
            if part:
                alone.state_dict()[name.replace(part, mine[part], 1)].copy_(value)
        answers = alone(z, t)
        for name in ("age", "site"):
            torch.testing.assert_close(said[name][:, reader], answers[name][:, 0])
    assert not torch.allclose(said["age"][:, 0], said["age"][:, 1])


def test_several_questions_of_a_row_are_rows_of_one_volume() -> None:
    """The answers are those of single questions; volumes are told the first."""
    v = variables()
    z, t = inputs(v, 2)
    more, levels = inputs(v, 6)
    net = model(v)
    ours = net({**more, "v0": z["v0"]}, {**levels, "v0": t["v0"]})
    rows = net({**more, "v0": z["v0"].repeat_interleave(3, 0)}, {**levels, "v0": t["v0"].repeat_interleave(3)})
    for name in ("age", "site"):
        torch.testing.assert_close(ours[name], rows[name])
    torch.testing.assert_close(ours["v0"], rows["v0"][::3])


def test_what_the_reader_is_shown_answers_for_scalars_alone() -> None:
    """Volumes are denoised as they are, scalars answered from what stands in their place."""
    v = variables(channels=(2, 1))
    z, t = inputs(v, 4)
    other, levels = {"v1": torch.randn(4, 1, 4, 4, 4)}, {"v1": torch.zeros(4, dtype=torch.int64)}
    net = model(v)
    ours, usual, shown = net(z, t, shown=(other, levels)), net(z, t), net({**z, **other}, {**t, **levels})
    for name in v.names:
        assert torch.equal(ours[name], (usual if name in ("v0", "v1") else shown)[name])
        assert not torch.equal(usual[name], shown[name])


def test_volumes_at_rest_cost_no_unet() -> None:
    """Rows whose volumes are known get zeros for them, everybody else the same values and gradients as ever."""
    v = variables(channels=(2, 1))
    z, t = inputs(v, 4)
    t |= {"v0": torch.tensor([0, 5, 0, 0]), "v1": torch.tensor([0, 0, 0, 9])}
    net = model(v)
    rows: list[int] = []
    hook = net.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    ours, whole = net(z, t), net.expand(net.contract(z, t), z, t)
    assert rows == [2, 4]
    for name in ("v0", "v1"):
        torch.testing.assert_close(ours[name][[1, 3]], whole[name][[1, 3]])
        assert not ours[name][[0, 2]].any()
    net(z, {**t, "v0": t["v0"] * 0, "v1": t["v1"] * 0})
    assert rows[2] == 1, "the same layers run at every worker"
    hook.remove()


def test_compiled_it_says_the_same_and_is_compiled_once_for_any_number_of_moving_rows() -> None:
    """Any but one, which torch always compiles for itself."""
    torch._dynamo.reset()
    net, graphs = model(variables((3, 4, 2))), []
    z, t = inputs(variables((3, 4, 2)), 8)
    plain = {n: net(z, {**t, "v0": torch.where(torch.arange(8) < n, t["v0"], 0)}) for n in (3, 8, 2, 5)}
    net.compile(backend="eager")
    for n, said in plain.items():
        compiled = net(z, {**t, "v0": torch.where(torch.arange(8) < n, t["v0"], 0)})
        for name, value in said.items():
            torch.testing.assert_close(compiled[name], value)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 1


@DESIGNS
def test_values_that_are_noise_are_not_shown(design: str) -> None:
    v = variables(channels=(2, 1))
    z, _ = inputs(v)
    at = {name: torch.tensor([1000, 1000, 999]) for name in v.names}
    net = model(v, design, blind=1000).eval()
    moved = {name: (x + 1) % 3 if name == "site" else x + 1 for name, x in z.items()}
    before, after = net(z, at), net(moved, at)
    for name in v.names:
        torch.testing.assert_close(before[name][:2], after[name][:2])
        assert (before[name][2] - after[name][2]).abs().max() > 1e-5


@DESIGNS
def test_a_row_does_not_depend_on_the_others(design: str) -> None:
    v = variables()
    z, t = inputs(v, n=4)
    net = model(v, design).eval()
    whole = net(z, t)
    alone = net({k: x[2:3] for k, x in z.items()}, {k: x[2:3] for k, x in t.items()})
    for name in v.names:
        torch.testing.assert_close(alone[name], whole[name][2:3], atol=1e-5, rtol=1e-4)


@DESIGNS
def test_every_level_and_value_reaches_every_output(design: str) -> None:
    v = variables(channels=(2, 1))
    z, t = inputs(v)
    net = model(v, design).eval()
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
        net = model(v, design, checkpointing).train()
        sum(x.square().sum() for x in net(z, t).values()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, kept in zip(*gradients):
        assert plain is not None  # no parameter is idle
        torch.testing.assert_close(plain, kept)


def test_a_fresh_network_says_that_nothing_is_known() -> None:
    v = variables()
    z, t = inputs(v)
    fresh = JointDenoiser(v, config.DenoiserConfig("late", 4, 1, [8, 16], [False, False], 1, 8, 4, 16, 0.0, False))
    said = fresh(z, t)
    assert all((x == 0).all() for x in (said["v0"], said["site"], said["age"][..., 0]))
    broad = density(said["age"])
    assert broad.mean.abs().max() < 1e-6 and (broad.stddev > 0.9).all()


def test_levels_are_told_apart() -> None:
    waves = sinusoid(torch.arange(1001), 32)
    distance = torch.cdist(waves, waves) + torch.eye(1001)
    assert distance.min() > 0.1


def test_schemas_without_scalars_and_without_volumes() -> None:
    alone = Variables([Volume("v0", (2, 4, 4, 4))])
    net = JointDenoiser(alone, config.DenoiserConfig("late", 4, 1, [8, 16], [False, True], 1, 8, 4, 16, 0.0, False))
    z = torch.randn(2, 2, 4, 4, 4)
    assert net({"v0": z}, {"v0": torch.tensor([3, 900])})["v0"].shape == z.shape
    with pytest.raises(ValueError, match="at least one volume"):
        JointDenoiser(
            Variables([AGE, SITE]), config.DenoiserConfig("late", 4, 1, [8], [False], 1, 8, 4, 16, 0.0, False)
        )
    sizes = Variables([Volume("a", (2, 4, 4, 4)), Volume("b", (2, 4, 4, 2))])
    with pytest.raises(ValueError, match="of one size"):
        JointDenoiser(sizes, config.DenoiserConfig("late", 4, 1, [8], [False], 1, 8, 4, 16, 0.0, False))


@pytest.mark.slow
def test_it_learns_a_joint_law() -> None:
    """Age and class written into a noisy image: one call at t = T finds them almost as well as Bayes' rule does."""
    v = Variables([Volume("image", (1, 2, 2, 2)), AGE, Categorical("sex", ("F", "M"))])
    settings = config.DiffusionConfig(1000, 0.0015, 0.0195, "independent", 0.2, 0.3, 0.3, "v", "v", {})
    process = JointDiffusion(v, settings)
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
    small = config.DenoiserConfig("late", 4, 1, [16, 16], [False, False], 1, 16, 1, 32, 0.0, False)
    net = JointDenoiser(v, small, process.masked_level)
    net.adapt({"image": people(256)["image"]})
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    steps, questions = 300, 4
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = streams(n * questions)
        noised = process.noise(people(n), {}, process.draw_times(rows), rows)
        loss = process.total(process.losses(net(noised.z, noised.t), noised)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test = people(1000)
    with torch.no_grad():
        laws = Posterior(net.eval(), process, {"image": test["image"]}, 1000).laws(["age", "sex"])
    age, truth = laws["age"], test["age"][:, 0].double()
    error = (age.mean - truth).square().mean().sqrt() / sd  # Bayes-optimal: 1 / sqrt(1 + 2^2) = 0.45; the mean: 1
    right = (laws["sex"].argmax(1) == test["sex"]).double().mean()  # Bayes-optimal: 0.97; guessing: 0.5
    assert error < 0.6
    assert 0.35 < age.stddev.mean() / sd < 0.6
    assert right > 0.93
