"""Synthetic people and completions: the same for any batch, a BIDS tree that packs again, known voxels as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_from_to
from nibabel.spaces import vox2out_vox

from mvhpc.config import ConfigError, Device, Sampling, load_config
from mvhpc.diffusion.categorical import draw
from mvhpc.execute import execute, plan
from mvhpc.inference import generate, inpaint
from mvhpc.inference.generate import GenerateConfig, draw_people
from mvhpc.inference.geometry import nifti
from mvhpc.inference.inpaint import InpaintConfig, complete, inpaint_half, latent_mask, left_half, place
from mvhpc.inference.sampler import Sampler
from mvhpc.inference.scalar_draws import draw_scalars
from mvhpc.models.bundle import JointModel, load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run, read_record
from mvhpc.runtime.randomness import rand
from mvhpc.stages import STAGES
from shards import volumes
from shards.dataset import open_dataset
from shards.pack import pack

FEW = Sampling(conditioning="auto", steps=5, stride=200, solver="ddim", guidance=1.0)
CPU = Device(device="cpu", precision="float32", threads=0, compile=False)


def configuration(model: Path, out: Path, **values: Any) -> GenerateConfig:
    few = {"sampling.steps": 5, "sampling.stride": 200, "count": 6, "compute.device": "cpu"}
    return load_config(GenerateConfig, "generate", "default", (), few | {"model": str(model), "out": str(out)} | values)


@pytest.fixture(scope="module", params=["late", "early"])
def sampler(request: pytest.FixtureRequest, tiny_model: Path, tiny_early: Path) -> Sampler:
    late = request.param == "late"
    few = FEW if late else replace(FEW, conditioning="repaint")
    return Sampler(load(tiny_model if late else tiny_early, kind=JointModel), few, CPU)


def test_people_do_not_depend_on_the_batch_or_the_count(sampler) -> None:
    alone = list(draw_people(sampler, 4, {}, seed=3, batch=1))
    together = list(draw_people(sampler, 6, {}, seed=3, batch=5))
    for one, other in zip(alone, together):
        assert one["sex"] == other["sex"]
        assert one["age"] == pytest.approx(other["age"], rel=1e-4)
        assert np.abs(one["image"] - other["image"]).max() < 1e-4
    assert len({person["image"].tobytes() for person in together}) == 6
    other_seed = next(draw_people(sampler, 1, {}, seed=4, batch=1))
    assert np.abs(other_seed["image"] - alone[0]["image"]).max() > 1e-3


@pytest.mark.slow
def test_a_compiled_model_draws_the_same_people(tiny_model: Path) -> None:
    torch._dynamo.reset()
    few = replace(FEW, steps=2, stride=500)
    compiled, plain = (
        Sampler(load(tiny_model, kind=JointModel), few, replace(CPU, compile=way)) for way in (True, False)
    )
    for one, other in zip(*(draw_people(way, 2, {}, seed=3, batch=2) for way in (plain, compiled)), strict=True):
        assert one["sex"] == other["sex"] and one["age"] == pytest.approx(other["age"], rel=1e-3)
        assert np.abs(one["image"] - other["image"]).max() < 1e-3


def test_what_is_given_comes_out_as_given(sampler) -> None:
    for person in draw_people(sampler, 5, {"age": 71.3, "sex": "M"}, seed=0, batch=2):
        assert (person["age"], person["sex"]) == (71.3, "M")
        assert person["image"].shape == (16, 16, 16) and 0 <= person["image"].min() <= person["image"].max() <= 1


def test_a_generated_tree_packs_again(tiny_model, tmp_path) -> None:
    summary = generate.run(configuration(tiny_model, tmp_path / "people"), Run(tmp_path))
    tree = tmp_path / "people"
    rows = [line.split("\t") for line in (tree / "participants.tsv").read_text().splitlines()]
    assert rows[0] == ["participant_id", "age", "sex"] and len(rows) == 1 + summary["people"]
    pack(tree, tmp_path / "packed", spacing=8.0, shape=(16, 16, 16), max_rejects="0", keep_suspect=True)
    dataset = open_dataset(tmp_path / "packed")
    assert dataset.keys() == [row[0] for row in rows[1:]]
    for key, age, sex in rows[1:]:
        assert dataset.values(key) == {"age": float(age), "sex": sex}
        assert dataset.has(key, "image")
    made_by = json.loads((tree / "dataset_description.json").read_text())["GeneratedBy"][0]
    assert made_by["Name"] == "mvhpc" and made_by["Seed"] == 0
    assert (tmp_path / "figures" / "people.png").stat().st_size > 1000


def test_the_same_seed_writes_the_same_bytes(tiny_model, tmp_path) -> None:
    trees = []
    for name in ("a", "b"):
        generate.run(configuration(tiny_model, tmp_path / name, count=2), Run(tmp_path))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        trees.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert trees[0] == trees[1] and len(trees[0]) == 7
    with pytest.raises(FileExistsError, match="exists already"):
        generate.run(configuration(tiny_model, tmp_path / "a"), Run(tmp_path))


def test_nifti_keeps_voxels_and_place(tmp_path) -> None:
    voxels = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    voxels.flat[:2] = 0, 1
    affine = np.array([[2.0, 0, 0, -5], [0, 2, 0, -6], [0, 0, 2, -7], [0, 0, 0, 1]])
    nib.save(nifti(voxels, affine), tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.abs(image.get_fdata() - voxels).max() <= 0.5 / 32767 + 1e-7
    for there, code in (image.get_qform(coded=True), image.get_sform(coded=True)):
        assert code > 0 and there == pytest.approx(affine)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"agee": "70"}, "Did you mean 'age'"),
        ({"sex": "X"}, "unknown category"),
        ({"age": "200"}, "outside the range"),
        ({"age": "old"}, "not a number"),
        ({"age": "n/a"}, "leave age out"),
        ({"image": "a.nii"}, "mvhpc inpaint"),
    ],
)
def test_bad_given_values_are_refused(tiny_model, tmp_path, given, words) -> None:
    config = configuration(tiny_model, tmp_path / "people", **{f"given.{name}": text for name, text in given.items()})
    with pytest.raises(ConfigError, match=words):
        generate.run(config, Run(tmp_path))
    assert not (tmp_path / "people").exists()


def test_the_model_of_scalars_reads_what_was_filled_in(tiny_model: Path, tiny_dataset: Path, monkeypatch) -> None:
    """Scalars are drawn given the first completion, not where the model reads tissue maps; given ones are kept."""
    dataset, sampler = open_dataset(tiny_dataset), Sampler(load(tiny_model, kind=JointModel), FEW, CPU)
    voxels = dataset.read(dataset.keys()[0], "image").astype(np.float32)
    known, seen = left_half(voxels.shape), []
    spy = lambda *args: (seen.append(args[3]["image"][0]), draw_scalars(*args))[1]  # noqa: E731
    monkeypatch.setattr("mvhpc.inference.inpaint.draw_scalars", spy)
    (person,) = complete(sampler, "image", voxels, known, samples=1)
    assert len(seen) == 1 and (seen[0][known] == voxels[known]).all() and seen[0][~known].std() > 0
    assert 0 <= person["age"] <= 120 and person["sex"] in {"F", "M"}
    (person,) = complete(sampler, "image", voxels, known, {"age": 50.0}, samples=1)
    assert person["age"] == 50.0 and person["sex"] in {"F", "M"}
    assert sampler.model.scalars is not None
    monkeypatch.setitem(sampler.model.scalars.channels, "image", ["image_GM"])
    (person,) = complete(sampler, "image", voxels, known, {"age": 50.0}, samples=1)
    assert person.keys() == {"image", "age"} and len(seen) == 2


def test_scalars_are_drawn_by_the_chain_rule(tiny_scalars: Path) -> None:
    """The first from its law, the next from its law given that one: each uniform draw is found again."""
    model = load(tiny_scalars, kind=ScalarsModel)
    noise = [torch.Generator().manual_seed(i) for i in range(50)]
    people = draw_scalars(model, {}, [g.clone_state() for g in noise])
    u = rand(noise, (1, 2)).double()[:, 0]
    (age, sex), (values, known) = model.variables.scalars, model.variables.encode_scalars(people)
    nobody, pooled = torch.zeros(50, dtype=torch.bool), {}
    for v in model.variables.volumes:
        known[v.name], pooled[v.name] = nobody, torch.zeros(50, *v.shape)
    law = StackPosterior(model.stack, pooled, values, known | {"age": nobody, "sex": nobody}).laws(["age"])["age"]
    known_range = TrainingPeople.read(model.meta).ranges["age"]
    low, high = (law.cdf(x.double()) for x in age.encode(known_range)[:, 0])
    expected = low + u[:, 0] * (high - low)  # within the range of the training's people
    torch.testing.assert_close(law.cdf(values["age"][:, 0].double()), expected, atol=1e-4, rtol=0)
    assert all(known_range[0] <= person["age"] <= known_range[1] for person in people)
    chances = StackPosterior(model.stack, pooled, values, known | {"sex": nobody}).laws(["sex"])["sex"]
    assert torch.equal(values["sex"], draw(chances, u[:, 1])) and sex.name == "sex"


def test_a_latent_cell_is_known_if_all_its_voxels_are() -> None:
    known = torch.ones(8, 16, 8, dtype=torch.bool)
    known[3, 9, 0] = False
    mask = latent_mask(known, (2, 4, 2))
    assert mask.shape == (1, 1, 2, 4, 2) and mask.sum() == 15 and not mask[0, 0, 0, 2, 0]


def test_completions_keep_what_is_known(sampler, tiny_dataset, tmp_path) -> None:
    dataset = open_dataset(tiny_dataset)
    voxels = dataset.read(dataset.keys()[0], "image").astype(np.float32)
    known = left_half(voxels.shape)
    people = complete(sampler, "image", voxels, known, {"age": 50.0}, samples=2)
    for person in people:
        assert (person["image"][known] == voxels[known]).all() and person["age"] == 50.0
    assert np.abs(people[0]["image"] - people[1]["image"])[~known].max() > 1e-3
    # what lies in the unknown half has no influence
    blank = complete(sampler, "image", np.where(known, voxels, 0.7), known, {"age": 50.0}, samples=1)
    assert (blank[0]["image"] == people[0]["image"]).all()
    with pytest.raises(ConfigError, match="nothing to fill in"):
        complete(sampler, "image", voxels, np.ones_like(known))
    inpaint_half(sampler, dataset, dataset.keys()[0], tmp_path / "half.png", samples=2)
    assert (tmp_path / "half.png").stat().st_size > 1000


def test_the_second_time_the_autoencoder_sees_what_was_filled_in(sampler, tiny_dataset, monkeypatch) -> None:
    dataset, seen = open_dataset(tiny_dataset), []
    voxels = dataset.read(dataset.keys()[0], "image").astype(np.float32)
    known, encode = left_half(voxels.shape), type(sampler.model).encode
    spy = lambda model, name, x: encode(model, name, seen.append(x) or x)  # noqa: E731
    monkeypatch.setattr(type(sampler.model), "encode", spy)
    done = complete(sampler, "image", voxels, known, samples=1)[0]["image"]
    first, second = (x[0, 0].numpy() for x in seen)
    assert (first[known] == voxels[known]).all() and (second[known] == voxels[known]).all()
    assert (first[~known] == 0).all() and np.corrcoef(second[~known], done[~known])[0, 1] > 0.5


def reoriented(folder: Path, tiny_bids: Path) -> tuple[Path, Path]:
    """A brain whose file runs to the back, the left and upwards, far from the origin; and a mask of its right half."""
    source = nib.load(tiny_bids / "sub-00" / "anat" / "sub-00_T1w.nii.gz").get_fdata(dtype=np.float32)
    affine = np.array([[0, -8.0, 0, 90], [-8, 0, 0, 30], [0, 0, 8, -40], [0, 0, 0, 1]])
    flipped = source[::-1, ::-1].swapaxes(0, 1)  # axes: back, left, up
    half = np.zeros(flipped.shape, np.uint8)
    half[:, : half.shape[1] // 2] = 1
    nib.save(nib.Nifti1Image(flipped, affine), folder / "image.nii.gz")
    nib.save(nib.Nifti1Image(half, affine), folder / "half.nii.gz")
    nib.save(nib.Nifti1Image((flipped > 0).astype(np.uint8), affine), folder / "brain.nii.gz")
    return folder / "image.nii.gz", folder / "half.nii.gz"


def test_image_and_mask_are_placed_together_as_packing_places_the_image(tiny_bids, tiny_dataset, tmp_path) -> None:
    image, _ = reoriented(tmp_path, tiny_bids)
    dataset = open_dataset(tiny_dataset)
    voxels, brain, affine = place(image, tmp_path / "brain.nii.gz", dataset.index.grid)
    packed = dataset.read("sub-00", "image")
    assert (voxels == packed).all()
    assert not ((voxels > 0) & ~brain).any() and (brain & (voxels == 0)).sum() <= 1  # the darkest voxel becomes 0
    there = resample_from_to(nib.load(image), (voxels.shape, affine), order=0).get_fdata()
    inside = (voxels > 0) & (voxels < 1)  # where the brightest are not cut off
    assert np.corrcoef(there[inside], voxels[inside])[0, 1] > 0.999999


@pytest.mark.parametrize("spacing", [8.0, 10.0])
def test_a_coarser_mask_grid_keeps_its_place(tiny_bids, tmp_path, spacing) -> None:
    image, half = reoriented(tmp_path, tiny_bids)
    fine = nib.load(half)
    coarse = resample_from_to(fine, vox2out_vox(fine, [spacing] * 3), order=0, mode="nearest")
    nib.save(coarse, tmp_path / "coarse.nii.gz")
    _, known, affine = place(image, tmp_path / "coarse.nii.gz", volumes.grid(4.0, (32, 32, 32)))
    x = affine[0, 0] * np.arange(32) + affine[0, 3]  # mm to the right
    middle = fine.affine[0, 1] * (fine.shape[1] // 2 - 0.5) + fine.affine[0, 3]
    assert known[x > middle + spacing].all() and not known[x < middle - spacing].any()


@pytest.mark.slow
def test_several_completions_end_as_a_finished_stage(tiny_model, tiny_bids, tmp_path) -> None:
    """The output folder itself does not exist, only its numbered siblings."""
    image, half = reoriented(tmp_path, tiny_bids)
    out = tmp_path / "filled.nii.gz"
    values = {"model": str(tiny_model), "image": str(image), "mask": str(half), "out": str(out), "samples": 2}
    values |= {"sampling.steps": 2, "sampling.stride": 500, "tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    execute(plan("inpaint", load_config(InpaintConfig, "inpaint", "default", (), values)))
    assert read_record(STAGES["inpaint"].run_folder(out))["status"] == "finished"
    assert sorted(path.name for path in tmp_path.glob("filled_*")) == [
        f"filled_{i}{ending}" for i in (1, 2) for ending in (".json", ".nii.gz")
    ]


def test_inpainting_writes_volumes_that_lie_on_the_image(tiny_model, tiny_bids, tmp_path, capsys) -> None:
    image, half = reoriented(tmp_path, tiny_bids)
    values = {
        "model": str(tiny_model),
        "image": str(image),
        "mask": str(half),
        "out": str(tmp_path / "filled.nii.gz"),
        "samples": 2,
        "sampling.steps": 5,
        "given.sex": "F",
    }
    config = load_config(InpaintConfig, "inpaint", "default", (), values)
    summary = inpaint.run(config, Run(tmp_path))
    first, second = (nib.load(tmp_path / f"filled_{i}.nii.gz") for i in (1, 2))
    assert "sex F" in summary["filled_1.nii.gz"] and 0.3 < summary["known_voxels"] < 0.7
    source, known = nib.load(image), nib.load(half).get_fdata() > 0
    for filled in (first, second):
        assert (filled.affine == source.affine).all() and filled.get_data_dtype() == source.get_data_dtype()
        assert (np.asarray(filled.dataobj)[known] == np.asarray(source.dataobj)[known]).all()
    assert np.abs(first.get_fdata() - second.get_fdata()).max() > 1e-3
    (warning,) = json.loads((tmp_path / "filled_1.json").read_text())["Warnings"]
    assert "stored upside down" in warning and warning in capsys.readouterr().err  # ellipsoids are no brains
    for key, text, words in [
        ("mask", str(tmp_path / "none.nii"), "mask="),
        ("image", str(tiny_bids / "participants.tsv"), "not a NIfTI file"),
        ("variable", "imgae", "Did you mean 'image'"),
        ("out", "filled.png", "name it with .nii"),
        ("out", str(image.with_name("half.nii.gz")), "half.nii.gz, which is read"),
    ]:
        alone = values | {"samples": 1, key: text}
        with pytest.raises(ConfigError, match=words):
            inpaint.run(load_config(InpaintConfig, "inpaint", "default", (), alone), Run(tmp_path))
