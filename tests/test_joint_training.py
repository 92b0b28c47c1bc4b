"""The joint task: noise that belongs to a sample, missing values, and schemas as configuration."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from mvhpc.config import AutoencoderConfig, ConfigError, load_config
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, JointModel, load, save_autoencoder
from mvhpc.training.calibration import calibrate
from mvhpc.training.cross_fitting import assign_folds
from mvhpc.training.engines.base import Engine
from mvhpc.training.engines.local import LocalEngine
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.loop import train
from shards.index import Index
from tests.conftest import SMALL_JOINT
from tests.toy_task import digest


def task(latents: Path, model: Path, **changes: object) -> JointTask:
    places = {"latents": str(latents), "vae": str(model.parent / "vae"), "out": "unused", **SMALL_JOINT, **changes}
    return JointTask(load_config(JointConfig, "joint", "default", (), places))


def engines_of(joint: JointTask, rate: float = 0.0) -> dict[str, Engine]:
    config = joint.config
    return {
        name: LocalEngine(network, rate, config.optimizer, config.compute, None, 1)
        for name, network in joint.networks.items()
    }


def test_a_batch_is_the_mean_of_its_halves(tiny_latents: Path, tiny_model: Path) -> None:
    """Levels, noise and mirroring belong to (seed, step, sample): the loss does not see how a batch is divided."""
    joint = task(tiny_latents, tiny_model, **{"optimizer.lr": 0.0})
    engines = engines_of(joint)

    def losses(indices: list[int]) -> dict[str, torch.Tensor]:
        found = joint.step(joint.load(indices), engines, step=7, indices=indices)
        return {name: value.detach().clone() for name, value in found.items()}

    whole, first, second = losses([0, 1, 2, 3]), losses([0, 1]), losses([2, 3])
    for name, value in whole.items():
        assert torch.isclose(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6), name
    assert any(not torch.isclose(first[name], second[name]) for name in whole)


def test_people_keep_what_they_have_and_lack(tiny_latents: Path, tiny_model: Path) -> None:
    """A missing scalar has no validation loss, and everybody else's is finite."""
    joint = task(tiny_latents, tiny_model, split="default")
    indices = list(range(joint.validation))
    assert sorted(joint.held_out) == list(range(len(joint.people.keys)))
    found = joint.validate(indices, joint.networks)
    for name in ("age", "sex"):
        missing = ~joint.people.present[name][joint.held_out]
        assert missing.any() or name == "sex"
        assert torch.equal(found[f"loss_{name}"].isnan(), missing)
    for name in ("loss", "loss_of_volumes", "loss_image"):  # the U-Net is not validated on its training part
        assert torch.equal(found[name].isnan(), joint.in_training[joint.held_out])
    assert found["loss_of_scalars"].isfinite().all()
    again = joint.validate(indices, joint.networks)
    for name, value in found.items():  # the same levels and noise at every validation
        assert torch.equal(value.nan_to_num(), again[name].nan_to_num())


def test_nobody_is_held_out_from_what_was_trained_on_them(tiny_latents: Path, tiny_model: Path) -> None:
    """No gradient of a person reaches the member they are held out from, nor the U-Net of a person of the validation
    part; and no other member's weights change their validation."""
    joint = task(tiny_latents, tiny_model, **{"model.ensemble_members": 3, "optimizer.lr": 0.0})
    for network in joint.networks.values():
        for weights in network.parameters():  # output layers start at zero
            weights.data += 0.05 * torch.randn_like(weights)
    engines = engines_of(joint)
    assert joint.samples == len(joint.people.keys) > 3 and 0 < joint.in_training.sum() < joint.samples
    for person in range(joint.samples):
        with pytest.MonkeyPatch.context() as patch:
            for name, engine in engines.items():
                joint.networks[name].zero_grad()
                patch.setattr(engine, "step", lambda: None)  # leaves the gradients
            joint.step(joint.load([person]), engines, step=0, indices=[person])
        (held_out,) = (~joint.in_fold[person]).nonzero()[:, 0].tolist()
        moved = {
            name: {
                key for key, weights in network.named_parameters() if weights.grad is not None and weights.grad.any()
            }
            for name, network in joint.networks.items()
        }
        assert {int(key.split(".")[1]) for key in moved["scalars"]} == {0, 1, 2} - {held_out}
        assert bool(moved["denoiser"]) <= bool(joint.in_training[person])

        index = joint.held_out.index(person)
        before = joint.validate([index], joint.networks)["loss_of_scalars"]
        with torch.no_grad():
            for key, weights in joint.networks["scalars"].named_parameters():
                if int(key.split(".")[1]) != held_out:
                    weights += 1
        assert torch.equal(joint.validate([index], joint.networks)["loss_of_scalars"], before)


@pytest.mark.parametrize("people", [4, 23, 200])
def test_every_group_is_held_out_from_one_member_and_folds_are_even(people: int) -> None:
    groups = [f"family-{i * 7 % (people // 2)}" for i in range(people)]
    in_fold = assign_folds(groups, 5, seed=3)
    assert ((~in_fold).sum(1) == 1).all()
    held_out = (~in_fold).int().argmax(1)
    by_group = {group: {int(j) for g, j in zip(groups, held_out) if g == group} for group in groups}
    assert all(len(members) == 1 for members in by_group.values())
    sizes = [sum(member in members for members in by_group.values()) for member in range(5)]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(in_fold, assign_folds(groups, 5, seed=3))


def test_calibration_sees_the_predictions_of_inference(tiny_latents: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Training under bfloat16 exports the temperatures that float32 predictions of the exported model give."""
    changes = {"compute.precision": "bfloat16", "compute.device": "cpu", "training.epochs": 1, "training.batch": 3}
    joint = task(tiny_latents, tiny_model, **changes)
    for weights in joint.networks["scalars"].parameters():
        weights.data += 0.05 * torch.randn_like(weights)
    train(joint, joint.config, tmp_path)
    model = load(tmp_path, kind=JointModel)
    assert model.scalars is not None
    held_out = joint._read_held_out(range(len(joint.held_out)), torch.device("cpu"))
    assert model.temperature == calibrate(model.scalars, model.diffusion, *held_out)


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
    learnt = joint.in_training & joint.people.present["image"]
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
    engines = engines_of(joint, 1e-3)
    before = {name: engine.weights() for name, engine in engines.items()}
    joint.step(joint.load([0, 1]), engines, step=0, indices=[0, 1])
    after = {name: engine.weights() for name, engine in engines.items()}
    assert all(digest(before[name]) != digest(after[name]) for name in engines)
    joint.export(tmp_path / "model", after, {})
    loaded = load(tmp_path / "model")
    assert loaded.variables.names == joint.diffusion.variables.names
    for name, weights in after.items():
        assert digest(dict(getattr(loaded, name).state_dict())) == digest(weights)


def test_what_cannot_be_trained_on_is_named(
    tiny_latents: Path, tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="mvhpc encode"):
        task(tiny_dataset, tiny_model)
    with pytest.raises(ConfigError, match=r"clean_volume_prob=0\.7"):
        task(tiny_latents, tiny_model, **{"model.scalars": "early", "queries_per_volume": 1})
    with pytest.raises(ConfigError, match=r"split of .*'default'"):
        task(tiny_latents, tiny_model, split="defualt")
    file = tmp_path / "schema.yaml"
    file.write_text("image: {kind: volume, suffix: T1w}\nagee: {kind: continuous, range: [0, 100]}\n")
    with pytest.raises(ConfigError, match="'age'"):
        task(tiny_latents, tiny_model, schema=str(file))


def test_latents_of_another_autoencoder_are_refused(tiny_latents: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Both are named, before anything is started."""
    network, meta = load(tiny_model.parent / "vae", kind=AutoencoderModel)
    changed = Autoencoder(AutoencoderConfig(**meta["autoencoder"]))
    changed.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
    save_autoencoder(tmp_path / "vae" / "model", changed, AutoencoderConfig(**meta["autoencoder"]))
    config = task(tiny_latents, tiny_model).config
    JointTask.check(config)
    other = dataclasses.replace(config, vae=str(tmp_path / "vae"))
    with pytest.raises(ConfigError, match=f"vae={tmp_path}.*latents={tiny_latents}"):
        JointTask.check(other)


def test_a_split_with_another_training_part_than_the_latents_is_refused(
    tiny_latents: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = task(tiny_latents, tiny_model).config
    latents = tmp_path / "latents"
    shutil.copytree(tiny_latents, latents)
    index = Index.load(latents)
    split = index.splits["default"]
    swapped = {key: "test" if part == "train" else "train" for key, part in split.assignment.items()}
    index.splits.update({"same": split, "other": dataclasses.replace(split, assignment=swapped)})
    index.save(latents)
    JointTask.check(dataclasses.replace(config, latents=str(latents), split="same"))
    with pytest.raises(ConfigError, match=r"split=other.*encode again"):
        JointTask.check(dataclasses.replace(config, latents=str(latents), split="other"))
