"""The quality of drawn volumes: networks from checked files, and the stage on people whose quality is known."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.execute import execute, plan
from mvhpc.inference import evaluate_generation
from mvhpc.inference.generation_comparison import Cohorts, EvaluateGenerationConfig
from mvhpc.models.baseline import Baseline, scalars_of
from mvhpc.models.bundle import BaselineModel, load, save_baseline
from mvhpc.models.feature_networks import SliceFeatures, VolumeFeatures
from mvhpc.models.perceptual import squeezenet
from mvhpc.models.resnet50 import ResNet50
from mvhpc.models.weight_files import WeightsError
from mvhpc.runs.folder import Run
from shards.dataset import open_dataset
from shards.schema import Schema
from tests.conftest import SCHEMA, pack_people, save_untrained, write_bids

PEOPLE = 48


def saved(network: torch.nn.Module, path: Path, prefix: str = "") -> str:
    torch.save({prefix + name: value for name, value in network.state_dict().items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of random weights in the layout of SqueezeNet 1.1, and its hash."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.manual_seed(0)
    return path, saved(squeezenet(), path, "features.")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 people packed at 16 x 16 x 16, 20 or more of them in the test part."""
    return pack_people(write_bids(tmp_path_factory.mktemp("many") / "bids", PEOPLE), (0.55, 0.0, 0.45))


def tree(folder: Path, data: Path, keys: list[str], names: list[str] | None = None, volume: str = "image") -> Path:
    """A BIDS tree of packed people, under new names, with the scalars of ``names``."""
    dataset, lines = open_dataset(data), ["participant_id\tage\tsex"]
    for i, (key, whose) in enumerate(zip(keys, names or keys, strict=True)):
        (folder / f"sub-{i:04d}" / "anat").mkdir(parents=True)
        image = nib.Nifti1Image(dataset.read(key, volume).astype(np.float32), np.array(dataset.index.grid["affine"]))
        suffix = dataset.index.schema[volume].suffix
        nib.save(image, folder / f"sub-{i:04d}" / "anat" / f"sub-{i:04d}_desc-synthetic_{suffix}.nii.gz")
        values = dataset.values(whose)
        cells = ("n/a" if v is None else str(v) for v in (values["age"], values["sex"]))
        lines.append("\t".join([f"sub-{i:04d}", *cells]))
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def configuration(data: Path, weights: tuple[Path, str], out: Path, **values: Any) -> EvaluateGenerationConfig:
    places = {"data": str(data), "out": str(out), "features": str(weights[0]), "features_sha256": weights[1]}
    few = {"pixels": 32, "slices": 0.2, "resamples": 20, "sampling.steps": 2, "compute.device": "cpu"}
    tracking = {"tracking.uri": f"sqlite:///{out.parent / 'mlflow.db'}"}
    return load_config(EvaluateGenerationConfig, "evaluate-generation", "default", (), places | few | tracking | values)


def results(config: EvaluateGenerationConfig, folder: Path) -> pd.DataFrame:
    """Run the stage; its table by measure and plane."""
    evaluate_generation.run(config, Run(folder))
    frame = pd.read_csv(Path(config.out) / "generation.tsv", sep="\t", keep_default_na=True)
    return frame.fillna({"plane": ""}).set_index(["measure", "plane"])


def test_real_people_in_place_of_drawn_ones_reach_every_best_value(data: Path, weights, tmp_path: Path) -> None:
    keys = open_dataset(data).keys("test")
    drawn = tree(tmp_path / "real", data, keys)
    found = results(configuration(data, weights, tmp_path / "out", drawn=str(drawn)), tmp_path)
    for plane in ("axial", "coronal", "sagittal", "mean"):
        scale = found.loc[("fid_half", plane), "real"]
        assert found.loc[("fid", plane), "drawn"] < 1e-3 * scale
        assert found.loc[("fid", plane), "n"] == len(keys)
    assert found.loc[("precision", ""), "drawn"] == found.loc[("recall", ""), "drawn"] == 1
    for plane in ("axial", "coronal", "sagittal"):
        assert found.loc[("sharpness", plane), "drawn"] == pytest.approx(1, abs=1e-3)
    assert found.loc[("copies", ""), "drawn"] < 0.3  # ellipsoids are alike
    read = found.loc[("age_error_ridge", "")]
    assert read["drawn"] == pytest.approx(read["real"], rel=1e-2)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "age-by-ridge.png",
        "drawn-over-nearest.png",
        "fid-over-people.png",
        "nearest-people.png",
        "real-over-drawn.png",
        "ventricles-over-age.png",
    }
    content = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert len(content["rows"]) == len(found) and content["recipe"]["Network"]["pixels"] == 32
    assert content["recipe"]["Network"]["weights_sha256"] == weights[1]


def test_any_volume_of_the_data_can_be_chosen(weights, tmp_path: Path) -> None:
    """Drawn FLAIR volumes are the real ones; the T1w volumes of the same people are others."""
    bids = write_bids(tmp_path / "bids", PEOPLE)
    for path in bids.glob("sub-*/anat/*_T1w.nii.gz"):
        image = nib.load(path)
        turned = nib.Nifti1Image(np.sqrt(image.get_fdata()).astype(np.float32)[::-1], image.affine)
        nib.save(turned, path.with_name(path.name.replace("_T1w", "_FLAIR")))
    schema = {**SCHEMA, "flair": {"kind": "volume", "suffix": "FLAIR"}}
    data = pack_people(bids, (0.55, 0.0, 0.45), schema=schema)
    drawn = tree(tmp_path / "drawn", data, open_dataset(data).keys("test"), volume="flair")
    for image in drawn.glob("sub-*/anat/*"):
        shutil.copy(image, image.with_name(image.name.replace("_FLAIR", "_T1w")))
    fid = {}
    for name in ("flair", "image"):
        config = configuration(data, weights, tmp_path / name, drawn=str(drawn), variable=name)
        fid[name] = results(config, tmp_path).loc[("fid", "mean"), "drawn"]
        assert json.loads((tmp_path / name / "generation.json").read_text())["recipe"]["Volume"] == name
    assert fid["flair"] < 1e-3 * fid["image"]


def test_copies_of_the_training_are_found(data: Path, weights, tmp_path: Path) -> None:
    dataset = open_dataset(data)
    test = dataset.keys("test")
    drawn = tree(tmp_path / "copies", data, dataset.keys("train")[: len(test)], test)
    found = results(configuration(data, weights, tmp_path / "out", drawn=str(drawn)), tmp_path)
    assert found.loc[("copies", ""), "drawn"] == 1
    assert found.loc[("copies", ""), "real"] < 0.3
    assert found.loc[("distance_training", ""), "drawn"] < 1e-4


@pytest.mark.slow
def test_everybody_counts_once_whatever_their_visits(weights, tmp_path: Path) -> None:
    """Two visits of one person are alike: as two people they would make sets look less varied than they are."""
    bids = write_bids(tmp_path / "bids", 24)
    for image in sorted(bids.glob("sub-*/anat/*.nii.gz")):
        name = image.parts[-3]
        for session in ("ses-1", "ses-2"):
            (bids / name / session / "anat").mkdir(parents=True)
            shutil.copy(image, bids / name / session / "anat" / f"{name}_{session}_T1w.nii.gz")
        shutil.rmtree(image.parent)
    data = pack_people(bids, (0.0, 0.0, 1.0))
    test = open_dataset(data).keys("test")
    assert len(test) == 48
    drawn = tree(tmp_path / "drawn", data, test)
    who = Cohorts.of(configuration(data, weights, tmp_path / "out", drawn=str(drawn)))
    assert sorted(key.split("_")[0] for key in who.keys) == sorted({key.split("_")[0] for key in test})


def test_drawn_people_are_taken_by_chance_from_a_larger_tree(data: Path, weights, tmp_path: Path) -> None:
    """A tree may be sorted by age; its first people, or neighbours, would be alike."""
    dataset = open_dataset(data)
    ages = {key: age for key in dataset.keys("all") if (age := dataset.values(key)["age"]) is not None}
    drawn = tree(tmp_path / "sorted", data, sorted(ages, key=lambda key: ages[key]))
    who = Cohorts.of(configuration(data, weights, tmp_path / "out", drawn=str(drawn)))
    found = [values["age"] for values in who.values]
    assert len(found) == len(who.keys) < len(ages)
    assert max(found) > np.quantile(list(ages.values()), 0.8) and found != sorted(found)


def test_a_model_draws_for_the_scalars_of_each_person(data: Path, weights, tiny_vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beside"
    folder.mkdir()
    shutil.copytree(data, folder / "packed")
    model = save_untrained(folder / "packed", "early", tiny_vae, None)
    config = configuration(folder / "packed", weights, tmp_path / "out", model=str(model))
    summary = execute(plan("evaluate-generation", config))
    assert summary["people"] == len(open_dataset(data).keys("test")) and summary["fid"] > 0
    assert (tmp_path / "out" / "drawn-over-age.png").is_file()
    recipe = json.loads((tmp_path / "out" / "generation.json").read_text())["recipe"]
    assert recipe["Paired"] and recipe["Sampling"]["steps"] == 2 and not recipe["Warnings"]
    seen = configuration(folder / "packed", weights, tmp_path / "seen", model=str(model), split="train")
    evaluate_generation.run(seen, Run(tmp_path))
    assert "the model learnt from" in (tmp_path / "seen" / "generation.md").read_text()


@pytest.mark.slow
def test_a_model_of_the_volume_alone_draws_without_scalars(data: Path, weights, tiny_vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beside"
    folder.mkdir()
    shutil.copytree(data, folder / "packed")
    model = save_untrained(folder / "packed", "late", tiny_vae, None, ["image"])
    found = results(configuration(folder / "packed", weights, tmp_path / "out", model=str(model)), tmp_path)
    assert found.loc[("fid", "mean"), "drawn"] > 0
    assert not (tmp_path / "out" / "drawn-over-age.png").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give --model"),
        ({"drawn": "few", "variable": "imaeg"}, "Did you mean 'image'"),
        ({"drawn": "few"}, "at least 20 are needed"),
        ({"drawn": "large"}, r"has \(20, 20, 20\) voxels"),
        ({"drawn": "bright"}, r"have to lie in \[0, 1\]"),
        ({"drawn": "none"}, "has 0 volumes"),
        ({"drawn": "few", "slices": 2.0}, "at most 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(data: Path, weights, tmp_path: Path, values, words) -> None:
    keys = open_dataset(data).keys("test")
    folder = tree(tmp_path / "drawn", data, keys[:5] if values.get("drawn") == "few" else keys)
    first = next(folder.glob("sub-0000/anat/*.nii.gz"))
    match values.get("drawn"):
        case "large":
            nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.float32), np.eye(4)), first)
        case "bright":
            nib.save(nib.Nifti1Image(np.full((16, 16, 16), 7.0, np.float32), np.eye(4)), first)
        case "none":
            first.unlink()
    with pytest.raises(ConfigError, match=words):
        places = {"drawn": str(folder)} if "drawn" in values else {}
        config = configuration(data, weights, tmp_path / "out", **(values | places))
        evaluate_generation.run(config, Run(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_layers_of_resnet50_are_those_of_keras() -> None:
    """The number of weights that Keras states for ResNet50 without its top, and the names of the published file."""
    state = ResNet50().state_dict()
    assert sum(v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked")) == 23_587_712
    assert state["layer1.0.downsample.0.bias"].shape == (256,)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    with torch.inference_mode():
        assert ResNet50().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 2, 2)


def test_features_are_of_the_middle_slices_of_each_plane(weights: tuple[Path, str]) -> None:
    network = SliceFeatures(str(weights[0]), weights[1], 0.5, 32, "cpu")
    x = torch.rand(2, 20, 24, 18, generator=torch.Generator().manual_seed(0))
    axial, coronal, sagittal = network(x)
    assert [f.shape for f in (axial, coronal, sagittal)] == [(2, 9, 512), (2, 12, 512), (2, 10, 512)]
    border = x.clone()
    border[:, :, :, :4] = border[:, :, :, 13:] = 0  # outside of the middle half of the axial slices
    torch.testing.assert_close(network(border)[0], axial)
    turned = network(x.movedim(1, 3))  # (W, D, H): what was sagittal is axial
    torch.testing.assert_close(turned[0], sagittal)
    torch.testing.assert_close(network(x[1:])[2], sagittal[1:], atol=1e-5, rtol=1e-4)


def test_weights_are_checked_before_they_are_read(weights: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=weights[1]):  # the hash that it has, in the message
        SliceFeatures(str(weights[0]), "0" * 64, 0.4, 32, "cpu")
    with pytest.raises(WeightsError, match="no such file"):
        SliceFeatures(str(tmp_path / "none.pth"), weights[1], 0.4, 32, "cpu")
    other = tmp_path / "other.pth"
    with pytest.raises(WeightsError, match="neither SqueezeNet"):
        SliceFeatures(str(other), saved(torch.nn.Linear(2, 2), other), 0.4, 32, "cpu")
    resnet = tmp_path / "resnet.pth"
    network = SliceFeatures(str(resnet), saved(ResNet50(), resnet), 0.1, 0, "cpu")
    assert network(torch.rand(1, 40, 40, 40))[0].shape == (1, 4, 2048)
    assert network.recipe["network"] == "ResNet50, RadImageNet"


def test_an_in_domain_network_reads_what_its_baseline_predicts(tmp_path: Path) -> None:
    schema, grid = Schema.from_dict(SCHEMA), {"spacing": 4.0, "shape": [32, 32, 32], "affine": np.eye(4).tolist()}
    for want, given in (("age", ["image"]), ("sex", ["image"]), ("age", ["image", "sex"])):
        network = Baseline(scalars_of(schema, [*given, want], {"age": [40, 60]}), given, want)
        state = network.state_dict()
        folder = tmp_path / f"{want}{len(given)}"
        query: dict[str, Any] = {"given": given, "want": want, "schema": schema, "intervals": {"age": [40, 60]}}
        save_baseline(folder / "model", state, name="densenet", settings=None, grid=grid, **query)
    x = torch.rand(3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    for want in ("age", "sex"):
        features = VolumeFeatures(str(tmp_path / f"{want}1"), "image", "cpu")
        (found,) = features(x)
        assert found.shape == (3, 1, 1024) and features.name == "in-domain FID"
        model = load(tmp_path / f"{want}1", kind=BaselineModel)
        with torch.inference_mode():
            output = model.network(x[:, None], {}, {})
        read = features.read(found[:, 0].numpy())
        if want == "age":
            assert read == pytest.approx(model.scalars["age"].decode(output.double()).tolist(), rel=1e-4)
        else:
            assert read == ["FM"[i] for i in output.argmax(1)]
    with pytest.raises(ConfigError, match="reads image, sex"):
        VolumeFeatures(str(tmp_path / "age2"), "image", "cpu")
