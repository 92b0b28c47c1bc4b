"""The joint task: noise that belongs to a sample, missing values, and schemas as configuration."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from mvhpc.config import AutoencoderConfig, ConfigError, load_config
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, JointModel, load, save_autoencoder
from mvhpc.training.cross_fitting import assign_folds
from mvhpc.training.engines.base import Engine
from mvhpc.training.engines.local import LocalEngine
from mvhpc.training.joint import JointConfig, JointTask
from shards.index import Index
from tests.conftest import SMALL_JOINT
from tests.toy_task import digest

EARLY = {"model.scalars": "early", "model.linear_components": 0, "scalars": ""}


def task(inputs: dict[str, str], **changes: object) -> JointTask:
    places = {**inputs, "out": "unused", **SMALL_JOINT, **changes}
    return JointTask(load_config(JointConfig, "joint", "default", (), places))


def engines_of(joint: JointTask, rate: float = 0.0) -> dict[str, Engine]:
    config = joint.config
    return {
        name: LocalEngine(network, rate, config.optimizer, config.compute, None, 1)
        for name, network in joint.networks.items()
    }


def test_a_batch_is_the_mean_of_its_halves(tiny_inputs: dict[str, str]) -> None:
    """Levels, noise and mirroring belong to (seed, step, sample): the loss does not see how a batch is divided."""
    joint = task(tiny_inputs, **{"optimizer.lr": 0.0})
    engines = engines_of(joint)

    def losses(indices: list[int]) -> dict[str, torch.Tensor]:
        found = joint.step(joint.load(indices), engines, step=7, indices=indices)
        return {name: value.detach().clone() for name, value in found.items()}

    whole, first, second = losses([0, 1, 2, 3]), losses([0, 1]), losses([2, 3])
    for name, value in whole.items():
        assert torch.isclose(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6), name
    assert any(not torch.isclose(first[name], second[name]) for name in whole)


def test_people_keep_what_they_have_and_lack(tiny_inputs: dict[str, str]) -> None:
    """A missing value has no validation loss, and everybody else's is finite; the validation part alone is seen."""
    joint = task(tiny_inputs, **EARLY)
    assert (joint.samples, joint.validation) == (5, 1) and len(joint.people.keys) == 6
    before = joint.validate([0], joint.networks)
    again = joint.validate([0], joint.networks)
    assert all(torch.equal(value, again[name]) for name, value in before.items())  # the same levels and noise
    joint.people.present["age"][5] = False
    after = joint.validate([0], joint.networks)
    assert after["loss_age"].isnan() and not before["loss_age"].isnan()
    assert after["loss"].isfinite() and torch.equal(after["loss_sex"].isnan(), before["loss_sex"].isnan())


def test_without_a_model_of_scalars_the_unet_predicts_them(
    tiny_inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said before training; the model that is written predicts by chains."""
    joint = task(tiny_inputs, scalars="")
    assert joint.networks["denoiser"].outputs == ["image", "age", "sex"] and joint.linear is None
    JointTask.check(joint.config)
    assert "the U-Net predicts scalars too, by chains" in capsys.readouterr().err
    joint.export(tmp_path / "model", {"denoiser": joint.networks["denoiser"].state_dict()}, {})
    model = load(tmp_path / "model", kind=JointModel)
    assert model.scalars is None and not model.denoiser.late
    late = task(tiny_inputs)
    assert late.networks["denoiser"].outputs == ["image"] and late.linear is not None


def test_the_model_of_scalars_has_to_fit(tiny_inputs: dict[str, str], tmp_path: Path) -> None:
    """It is there where the design needs one; of the same scalars and grid; and has not seen the test part."""
    with pytest.raises(ConfigError, match="scalars is empty: give the run folder"):
        task(tiny_inputs, scalars="", **{"model.scalars": "late"})
    with pytest.raises(ConfigError, match="leave it empty"):
        task(tiny_inputs, **{**EARLY, "scalars": tiny_inputs["scalars"]})
    alone = {**tiny_inputs, "out": "unused", **SMALL_JOINT, "schema": "image-only"}
    with pytest.raises(ConfigError, match=r"leave it empty \(`scalars=`\) where .*, or the schema has no scalars"):
        JointTask.check(load_config(JointConfig, "joint", "default", (), alone))
    with pytest.raises(ConfigError, match="kind autoencoder; one of the kind scalars"):
        task(tiny_inputs, scalars=tiny_inputs["vae"])
    with pytest.raises(ConfigError, match="time=shared: independent"):
        task(tiny_inputs, **{"diffusion.time": "shared"})
    file = tmp_path / "schema.yaml"
    file.write_text("image: {kind: volume, suffix: T1w}\nage: {kind: continuous, range: [0, 120], unit: years}\n")
    with pytest.raises(ConfigError, match=r"has age, sex, this model age; .* \(sex differs\)"):
        task(tiny_inputs, schema=str(file))
    shutil.copytree(tiny_inputs["scalars"], tmp_path / "scalars")
    manifest = tmp_path / "scalars" / "model" / "model.json"
    meta = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(meta | {"grid": meta["grid"] | {"spacing": 4.0}}))
    with pytest.raises(ConfigError, match="volumes of another grid"):
        task(tiny_inputs, scalars=str(tmp_path / "scalars"))
    latents = tmp_path / "latents"
    shutil.copytree(tiny_inputs["latents"], latents)
    index = Index.load(latents)
    assignment = index.splits["default"].assignment
    moved = {key: "test" if part == "validation" else part for key, part in assignment.items()}
    index.splits["other"] = dataclasses.replace(index.splits["default"], assignment=moved)
    index.save(latents)
    (seen,) = (key for key, part in assignment.items() if part == "validation")
    with pytest.raises(ConfigError, match=f"1 people of the test part of split=other, as {seen}"):
        task(tiny_inputs | {"latents": str(latents)}, split="other")


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


def test_mirrored_latents_are_drawn_for_about_half(tiny_inputs: dict[str, str]) -> None:
    joint = task(tiny_inputs)
    versions = joint.people.values["image"]
    assert versions.shape[1] == 2
    values, _ = joint.people.take([0, 1])
    plain = joint._encode(values, torch.tensor([False, False]))["image"]
    mixed = joint._encode(values, torch.tensor([False, True]))["image"]
    mean, sd = joint.latent["image"]["mean"], joint.latent["image"]["sd"]
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(mixed[1], (versions[1, 1].float() - mean) / sd)
    assert not torch.equal(plain[1], mixed[1])


def test_latents_are_standardised_over_the_training_people(tiny_inputs: dict[str, str]) -> None:
    """Each element by itself, mirrored versions too; with the paper's scaling by one number for all."""
    joint = task(tiny_inputs)
    learnt = joint.people.present["image"] & (torch.arange(len(joint.people.keys)) < joint.samples)
    stored = joint.people.values["image"].flatten(0, 1)[learnt.repeat_interleave(2)]
    z = joint.diffusion.variables.volumes[0].encode(stored)  # (2N, C, h, w, d)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=1e-4, rtol=0)
    floor = joint.latent["image"]["sd"].min()
    free = joint.latent["image"]["sd"] > floor  # all but those that hardly vary
    torch.testing.assert_close(z.std(0, correction=0)[free], torch.ones_like(z[0])[free], atol=1e-4, rtol=0)
    assert free.float().mean() > 0.5
    by_one = task(tiny_inputs, scaling="range").latent["image"]
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
    schema: str, kinds: list[str], tiny_inputs: dict[str, str], tmp_path: Path
) -> None:
    """The image-only model and the one with a continuous sex are configurations; both train a step and are saved."""
    file = tmp_path / "schema.yaml"
    file.write_text(schema + "\n")
    joint = task(tiny_inputs, schema=str(file), **EARLY)
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


def test_what_cannot_be_trained_on_is_named(tiny_inputs: dict[str, str], tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mvhpc encode"):
        task(tiny_inputs, latents=str(tiny_dataset))
    with pytest.raises(ConfigError, match=r"split of .*'default'"):
        task(tiny_inputs, split="defualt")
    file = tmp_path / "schema.yaml"
    file.write_text("image: {kind: volume, suffix: T1w}\nagee: {kind: continuous, range: [0, 100]}\n")
    with pytest.raises(ConfigError, match="'age'"):
        task(tiny_inputs, schema=str(file))


def test_latents_of_another_autoencoder_are_refused(tiny_inputs: dict[str, str], tmp_path: Path) -> None:
    """Both are named, before anything is started."""
    network, meta = load(tiny_inputs["vae"], kind=AutoencoderModel)
    changed = Autoencoder(AutoencoderConfig(**meta["autoencoder"]))
    changed.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
    save_autoencoder(tmp_path / "vae" / "model", changed, AutoencoderConfig(**meta["autoencoder"]))
    config = task(tiny_inputs).config
    JointTask.check(config)
    other = dataclasses.replace(config, vae=str(tmp_path / "vae"))
    with pytest.raises(ConfigError, match=f"vae={tmp_path}.*latents={tiny_inputs['latents']}"):
        JointTask.check(other)


def test_a_split_with_another_training_part_than_the_latents_is_refused(
    tiny_inputs: dict[str, str], tmp_path: Path
) -> None:
    config = task(tiny_inputs).config
    latents = tmp_path / "latents"
    shutil.copytree(tiny_inputs["latents"], latents)
    index = Index.load(latents)
    split = index.splits["default"]
    swapped = {key: "test" if part == "train" else "train" for key, part in split.assignment.items()}
    index.splits.update({"same": split, "other": dataclasses.replace(split, assignment=swapped)})
    index.save(latents)
    JointTask.check(dataclasses.replace(config, latents=str(latents), split="same"))
    with pytest.raises(ConfigError, match=r"split=other.*encode again"):
        JointTask.check(dataclasses.replace(config, latents=str(latents), split="other"))
