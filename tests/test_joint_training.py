"""The joint task: noise that belongs to a sample, missing values, and schemas as configuration."""

from pathlib import Path

import pytest
import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.models.bundle import load
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.training.cross_fitting import shares
from mvhpc.training.engines.local import LocalEngine
from mvhpc.training.joint import JointConfig, JointTask
from tests.conftest import SMALL_JOINT


def task(latents: Path, model: Path, **changes: object) -> JointTask:
    places = {"latents": str(latents), "vae": str(model.parent / "vae"), "out": "unused", **SMALL_JOINT, **changes}
    return JointTask(load_config(JointConfig, "joint", "default", (), places))


def test_a_batch_is_the_mean_of_its_halves(tiny_latents: Path, tiny_model: Path) -> None:
    """Levels, noise and mirroring belong to (seed, step, sample): the loss does not see how a batch is divided."""
    joint = task(tiny_latents, tiny_model, **{"optimizer.lr": 0.0})
    config = joint.config
    engine = LocalEngine(joint.networks["denoiser"], 0.0, config.optimizer, config.compute, None, 1)

    def losses(indices: list[int]) -> dict[str, torch.Tensor]:
        found = joint.step(joint.load(indices), {"denoiser": engine}, step=7, indices=indices)
        return {name: value.detach().clone() for name, value in found.items()}

    whole, first, second = losses([0, 1, 2, 3]), losses([0, 1]), losses([2, 3])
    for name, value in whole.items():
        assert torch.isclose(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6), name
    assert any(not torch.isclose(first[name], second[name]) for name in whole)


def test_people_keep_what_they_have_and_lack(tiny_latents: Path, tiny_model: Path) -> None:
    """A missing scalar has no validation loss, and everybody else's is finite."""
    joint = task(tiny_latents, tiny_model, split="default")
    indices = list(range(joint.validation))
    assert sorted(joint.judges) == list(range(len(joint.people.keys)))
    found = joint.validate(indices, joint.networks)
    for name in ("age", "sex"):
        missing = ~joint.people.present[name][joint.judges]
        assert missing.any() or name == "sex"
        assert torch.equal(found[f"loss_{name}"].isnan(), missing)
    for name in ("loss", "loss_of_volumes", "loss_image"):  # whom the U-Net learnt from cannot judge it
        assert torch.equal(found[name].isnan(), joint.trained[joint.judges])
    assert found["loss_of_scalars"].isfinite().all()
    again = joint.validate(indices, joint.networks)
    for name, value in found.items():  # the same levels and noise at every validation
        assert torch.equal(value.nan_to_num(), again[name].nan_to_num())


def test_nobody_judges_what_learnt_from_them(tiny_latents: Path, tiny_model: Path) -> None:
    """No gradient of a person reaches the reader that they judge, nor the U-Net of a person of the validation part;
    and no other reader's weights move their verdict."""
    joint = task(tiny_latents, tiny_model, **{"model.readers": 3, "optimizer.lr": 0.0})
    config, network = joint.config, joint.networks["denoiser"]
    for weights in network.parameters():  # output layers start at zero: make all of them say something
        weights.data += 0.05 * torch.randn_like(weights)
    engine = LocalEngine(network, 0.0, config.optimizer, config.compute, None, 1)
    assert joint.samples == len(joint.people.keys) > 3 and 0 < joint.trained.sum() < joint.samples
    for person in range(joint.samples):
        network.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "step", lambda: None)  # leaves the gradients
            joint.step(joint.load([person]), {"denoiser": engine}, step=0, indices=[person])
        (judged,) = (~joint.taught[person]).nonzero()[:, 0].tolist()
        moved = {
            name for name, weights in network.named_parameters() if weights.grad is not None and weights.grad.any()
        }
        answering = {name for name in moved if name.startswith(JointDenoiser.ANSWERING)}
        assert {int(name.split(".")[1]) for name in answering} == {0, 1, 2} - {judged}
        assert bool(moved - answering) <= bool(joint.trained[person])

        index = joint.judges.index(person)
        before = joint.validate([index], joint.networks)["loss_of_scalars"]
        with torch.no_grad():
            for name, weights in network.named_parameters():
                if name.startswith(JointDenoiser.ANSWERING) and int(name.split(".")[1]) != judged:
                    weights += 1
        assert torch.equal(joint.validate([index], joint.networks)["loss_of_scalars"], before)


@pytest.mark.parametrize("people", [4, 23, 200])
def test_every_group_judges_one_reader_and_shares_are_even(people: int) -> None:
    groups = [f"family-{i * 7 % (people // 2)}" for i in range(people)]
    taught = shares(groups, 5, seed=3)
    assert ((~taught).sum(1) == 1).all()
    judged = (~taught).int().argmax(1)
    by_group = {group: {int(j) for g, j in zip(groups, judged) if g == group} for group in groups}
    assert all(len(readers) == 1 for readers in by_group.values())
    sizes = [sum(reader in readers for readers in by_group.values()) for reader in range(5)]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(taught, shares(groups, 5, seed=3))


def test_mirrored_latents_are_drawn_for_about_half(tiny_latents: Path, tiny_model: Path) -> None:
    joint = task(tiny_latents, tiny_model)
    versions = joint.people.values["image"]
    assert versions.shape[1] == 2
    values, _ = joint.people.take([0, 1])
    plain = joint._encode(values, torch.tensor([False, False]))["image"]
    mixed = joint._encode(values, torch.tensor([False, True]))["image"]
    mean, sd = joint.latent["image"]["mean"], joint.latent["image"]["sd"]
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(mixed[1], (versions[1, 1].float() - mean) / sd)
    assert not torch.equal(plain[1], mixed[1])


def test_latents_are_standardised_over_the_training_people(tiny_latents: Path, tiny_model: Path) -> None:
    """Each element by itself, mirrored versions too; with the paper's scaling by one number for all."""
    joint = task(tiny_latents, tiny_model)
    learnt = joint.trained & joint.people.present["image"]
    stored = joint.people.values["image"].flatten(0, 1)[learnt.repeat_interleave(2)]
    z = joint.diffusion.variables.volumes[0].encode(stored)  # (2N, C, h, w, d)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=1e-4, rtol=0)
    floor = joint.latent["image"]["sd"].min()
    free = joint.latent["image"]["sd"] > floor  # all but those that hardly vary
    torch.testing.assert_close(z.std(0, correction=0)[free], torch.ones_like(z[0])[free], atol=1e-4, rtol=0)
    assert free.float().mean() > 0.5
    by_one = task(tiny_latents, tiny_model, scaling="range").latent["image"]
    assert by_one["mean"].shape == by_one["sd"].shape == ()


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ("image: {kind: volume, suffix: T1w}", ["Volume"]),
        (
            "image: {kind: volume, suffix: T1w}\nsex: {kind: continuous, range: [-1, 1], values: {F: -1, M: 1}}",
            ["Volume", "Continuous"],
        ),
    ],
)
def test_other_models_are_other_schemas(
    schema: str, kinds: list[str], tiny_latents: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The image-only model and the one with a continuous sex are configurations; both train a step and are saved."""
    file = tmp_path / "schema.yaml"
    file.write_text(schema + "\n")
    joint = task(tiny_latents, tiny_model, schema=str(file))
    assert [type(v).__name__ for v in joint.diffusion.variables] == kinds
    config = joint.config
    engine = LocalEngine(joint.networks["denoiser"], 1e-3, config.optimizer, config.compute, None, 1)
    before = {name: value.clone() for name, value in engine.weights().items()}
    joint.step(joint.load([0, 1]), {"denoiser": engine}, step=0, indices=[0, 1])
    assert any(not torch.equal(before[name], value) for name, value in engine.weights().items())
    joint.export(tmp_path / "model", {"denoiser": engine.weights()}, {})
    loaded = load(tmp_path / "model")
    assert loaded.variables.names == joint.diffusion.variables.names
    for name, value in loaded.denoiser.state_dict().items():
        assert torch.equal(value, engine.weights()[name])


def test_what_cannot_be_trained_on_is_named(
    tiny_latents: Path, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="mvhpc encode"):
        task(tiny_dataset, tiny_model)
    with pytest.raises(ConfigError, match=r"reveal=0\.7"):
        task(tiny_latents, tiny_model, **{"model.scalars": "early", "questions": 1})
    file = tmp_path / "schema.yaml"
    file.write_text("image: {kind: volume, suffix: T1w}\nagee: {kind: continuous, range: [0, 100]}\n")
    with pytest.raises(ConfigError, match="'age'"):
        task(tiny_latents, tiny_model, schema=str(file))
