"""Volumes lie where their source lies: places survive packing, and what is drawn or completed is written there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from mvhpc.config import load_config
from mvhpc.inference import generate, inpaint, translate
from mvhpc.inference.geometry import place_of_record, place_of_training
from mvhpc.inference.own_grid import open_own_grid
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run
from shards.dataset import open_dataset
from shards.index import Index
from shards.intensity import intensity_scale
from shards.nifti import read
from shards.schema import Schema
from shards.verify import verify
from shards.volumes import canonical, grid
from tests.conftest import SCHEMA
from tests.packing import PEOPLE, bids, head, packed, save

SHAPE = (16, 16, 16)
FEW = {"sampling.steps": 2, "sampling.stride": 500, "compute.device": "cpu"}
OBLIQUE = np.array([[0, -2.1, 0.3, 41], [-1.9, 0, 0.2, -17], [0.3, 0.2, 2.0, 63], [0, 0, 0, 1.0]])


def moved(tiny_bids: Path, folder: Path) -> Path:
    """Four of the people of ``tiny_bids``, each lying elsewhere in the scanner."""
    source = folder / "bids"
    for number, file in enumerate(sorted(tiny_bids.rglob("*_T1w.nii.gz"))[:4]):
        affine = np.diag([8.0, 8, 8, 1])
        affine[:3, 3] = [11 * number, -7, 3 * number - 40]
        save(source / file.relative_to(tiny_bids), nib.load(file).get_fdata(dtype=np.float32), affine=affine)
    lines = (tiny_bids / "participants.tsv").read_text().splitlines()[:5]
    (source / "participants.tsv").write_text("\n".join(lines) + "\n")
    return source


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_a_landmark_is_packed_where_it_lies(tmp_path: Path, storage: str) -> None:
    """The brightest voxel of an oblique scan, by the record's affine, to within half a voxel of the grid."""
    source = bids(tmp_path / "bids", PEOPLE[:2])
    voxels = head()
    voxels[14:16, 15:18, 8:10] = 1000
    voxels[6:9, 8:11, 7:10] = 4000
    where = (OBLIQUE @ [7, 9, 8, 1])[:3]
    save(source / "sub-00" / "anat" / "sub-00_T1w.nii.gz", voxels, affine=OBLIQUE)
    packed(source, tmp_path / "packed", storage=storage, spacing=2.0, shape=(32, 32, 32))
    dataset = open_dataset(tmp_path / "packed")
    array, affine = dataset.read("sub-00", "image").astype(float), np.array(dataset.record("sub-00").affines["image"])
    bright = np.argwhere(array > 0.9 * array.max()).mean(0)
    assert np.abs((affine @ [*bright, 1])[:3] - where).max() <= 1.0
    assert not list(verify(tmp_path / "packed"))
    place = place_of_record(dataset.index.grid, Schema.load("default"), dataset.record("sub-00"), ["image"])
    assert (place.affine == affine).all() and place.name("sub-00", "T2w") == "sub-00_space-T1w_desc-synthetic_T2w"


def forget_places(folder: Path) -> None:
    """Make a data set one of an earlier version, which recorded no places."""
    index = Index.load(folder)
    dataclasses.replace(index, records=[dataclasses.replace(r, affines={}) for r in index.records]).save(folder)


def test_translations_lie_on_the_scans_and_old_data_say_that_they_cannot(
    tiny_model: Path, tiny_bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    packed(moved(tiny_bids, tmp_path), out, schema=Schema.from_dict(SCHEMA), spacing=8.0, shape=SHAPE)
    places = {"model": str(tiny_model), "data": str(out), "want": "image", "given": ["sex"]}

    def written(name: str) -> Path:
        values = {**places, **FEW, "out": str(tmp_path / name)}
        translate.run(load_config(translate.TranslateConfig, "translate", "default", (), values), Run(tmp_path))
        return tmp_path / name

    new, dataset = written("new"), open_dataset(out)
    assert "does not record where scans lie" not in capsys.readouterr().err
    for key in dataset.keys(None):
        file = new / key / "anat" / f"{key}_space-T1w_desc-synthetic_T1w.nii.gz"
        affine, source = nib.load(file).affine, tmp_path / "bids" / key / "anat" / f"{key}_T1w.nii.gz"
        assert affine == pytest.approx(np.array(dataset.record(key).affines["image"]))
        middle = (affine @ [8, 8, 8, 1])[:3]  # the brain's centre of mass, to half a voxel
        scan = read(source)
        mass = np.average(np.argwhere(scan.voxels > 0), axis=0)
        assert np.abs(middle - (scan.affine @ [*mass, 1])[:3]).max() <= 8
        assert (
            "T1w scan"
            in json.loads(file.with_name(f"{key}_space-T1w_desc-synthetic_T1w.json").read_text())["SpatialReference"]
        )
    forget_places(out)
    old = written("old")
    assert "packed by an earlier version and does not record where scans lie" in capsys.readouterr().err
    file = next(old.rglob("*.nii.gz"))
    assert "space-" not in file.name and nib.load(file).affine == pytest.approx(np.array(dataset.index.grid["affine"]))


def test_nobody_is_drawn_of_whom_nothing_that_is_given_is_known(
    tiny_model: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A volume of somebody at random would stand under the person's name; sub-03 has no age."""
    values = {"model": str(tiny_model), "data": str(tiny_dataset), "split": "all", "want": "image", "given": ["age"]}
    values |= {**FEW, "out": str(tmp_path / "drawn")}
    config = load_config(translate.TranslateConfig, "translate", "default", (), values)
    summary = translate.run(config, Run(tmp_path))
    assert "11 of 12 people answered; left out: 1 nothing that is given is known (sub-03)" in capsys.readouterr().err
    assert (summary["subjects"], summary["left_out"]) == (11, 1) and not (tmp_path / "drawn" / "sub-03").exists()


def test_drawn_people_lie_at_the_median_place_of_the_training(tiny_model: Path, tiny_dataset: Path, tmp_path: Path):
    values: dict[str, Any] = {**FEW, "model": str(tiny_model), "out": str(tmp_path / "people"), "count": 1}
    generate.run(load_config(generate.GenerateConfig, "generate", "default", (), values), Run(tmp_path))
    dataset = open_dataset(tiny_dataset)
    keys = [key for part in ("train", "validation") for key in dataset.keys(part)]
    origins = [np.array(dataset.record(key).affines["image"])[:3, 3] for key in keys]
    image = nib.load(tmp_path / "people" / "sub-0001" / "anat" / "sub-0001_desc-synthetic_T1w.nii.gz")
    assert image.affine[:3, 3] == pytest.approx(np.median(origins, 0))
    about = json.loads((tmp_path / "people" / "desc-synthetic_T1w.json").read_text())
    assert "median position" in about["SpatialReference"]


def test_a_template_is_the_place_of_all() -> None:
    template = grid(8.0, SHAPE) | {"space": "MNI152NLin2009aSym"}
    place = place_of_training(template, TrainingPeople(), "image")
    assert place.name("sub-1", "T1w") == "sub-1_space-MNI152NLin2009aSym_desc-synthetic_T1w"
    assert (place.affine == np.array(template["affine"])).all() and place.known
    unknown = place_of_training(grid(8.0, SHAPE), TrainingPeople(), "image")
    assert not unknown.known and "not recorded" in unknown.reference


@pytest.mark.parametrize("slope", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_a_completion_keeps_the_scan_bit_for_bit(tmp_path: Path, dtype: type[Any], slope: float) -> None:
    """On an oblique grid with any storage; what was packed of the scan comes back at the scan's intensities."""
    x, y, z = np.indices((20, 24, 18)) - np.array([10, 12, 8])[:, None, None, None]
    inside = (x / 6) ** 2 + (y / 8) ** 2 + (z / 5) ** 2 < 1
    stored = (inside * (100 + 10 * (x + y) - 2 * z)).astype(dtype)
    image = nib.Nifti1Image(stored, OBLIQUE)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "scan.nii.gz")
    half = np.zeros(stored.shape, np.uint8)
    half[:10] = 1
    nib.save(nib.Nifti1Image(half, OBLIQUE), tmp_path / "half.nii.gz")
    target = grid(1.0, (64, 64, 64))
    brain = canonical(tmp_path / "scan.nii.gz", 1.0, (64, 64, 64))
    affine = np.array(target["affine"])
    affine[:3, 3] += brain.origin
    own = open_own_grid(tmp_path / "scan.nii.gz", tmp_path / "half.nii.gz", affine, (64, 64, 64))
    nib.save(own.fill(brain.voxels.astype(np.float32)), tmp_path / "filled.nii.gz")
    filled = nib.load(tmp_path / "filled.nii.gz")
    raw = np.asanyarray(filled.dataobj.get_unscaled())
    assert raw.dtype == stored.dtype and (raw[:10] == stored[:10]).all()
    assert filled.affine == pytest.approx(OBLIQUE, abs=1e-5)
    assert filled.get_sform() == pytest.approx(nib.load(tmp_path / "scan.nii.gz").get_sform())
    truth, drawn = nib.load(tmp_path / "scan.nii.gz").get_fdata()[10:], filled.get_fdata()[10:]
    inside = binary_erosion(truth > 0)
    assert np.corrcoef(truth[inside], drawn[inside])[0, 1] > 0.9
    assert abs(drawn[inside].mean() / truth[inside].mean() - 1) < 0.1


def test_the_scale_of_intensities_is_that_of_packing(tmp_path: Path) -> None:
    low, high = intensity_scale(head().astype(np.float32))
    save(tmp_path / "scan.nii", head())
    brain = canonical(tmp_path / "scan.nii", 2.0, (20, 24, 18)).voxels.astype(float)
    values = low + brain[(brain > 0) & (brain < 1)] * (high - low)
    assert np.abs(values - np.rint(values)).max() < 0.5 and 99 < low < 110 and 1000 < high <= 1100


def test_inpainting_outside_of_the_box_leaves_background(tiny_model: Path, tiny_bids: Path, tmp_path: Path) -> None:
    voxels = np.zeros((40, 20, 20), np.float32)
    voxels[:20] = nib.load(tiny_bids / "sub-00" / "anat" / "sub-00_T1w.nii.gz").get_fdata()
    known = np.zeros(voxels.shape, np.uint8)
    known[:10] = 1
    for name, array in (("scan", voxels), ("known", known)):
        save(tmp_path / f"{name}.nii.gz", array, spacing=8.0)
    values = {"model": str(tiny_model), "image": str(tmp_path / "scan.nii.gz"), "mask": str(tmp_path / "known.nii.gz")}
    values |= {**FEW, "out": str(tmp_path / "filled.nii.gz")}
    inpaint.run(load_config(inpaint.InpaintConfig, "inpaint", "default", (), values), Run(tmp_path))
    filled = nib.load(tmp_path / "filled.nii.gz").get_fdata()
    assert (filled[:10] == voxels[:10]).all() and (filled[30:] == 0).all() and (filled[10:14] != 0).any()
    about = json.loads((tmp_path / "filled.json").read_text())
    assert about["UnknownVoxels"] == 30 * 400 and about["UnknownVoxelsOutsideOfTheModelsBox"] > 10 * 400
