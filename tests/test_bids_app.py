"""From raw scans to answers: the app answers as the stages do one by one, and says why it does not."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import mvhpc
from mvhpc.bids_app import main
from mvhpc.cli import main as mvhpc_main
from shards.dataset import open_dataset
from shards.pack import pack
from shards.phantom.make import make_phantoms
from shards.preprocess.recipe import Recipe
from shards.preprocess.run import preprocess
from tests.test_bundle import start_bundle

pytest.importorskip("ants")
pytest.importorskip("nilearn")
pytestmark = pytest.mark.slow

RECIPE = Recipe(steps=("brain", "registration", "tissue"), spacing=4.0)
SMALL = ["encoder.channels=[8,8]", "encoder.ensemble_members=2", "training.epochs=1", "training.batch=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw scans of twelve people, packed after preprocessing, and a model of scalars of them."""
    home = tmp_path_factory.mktemp("app")
    make_phantoms(home / "bids", 12, (48, 48, 48), 0)
    preprocess(home / "bids", home / "derivative", RECIPE, workers=1)
    pack(home / "derivative", home / "packed", spacing=4.0, shape=(48, 56, 48), fractions=(0.8, 0.1, 0.1), workers=1)
    paths = [f"data={home / 'packed'}", f"out={home / 'scalars'}"]
    assert mvhpc_main(["train", "scalars", *paths, *SMALL, "compute.precision=float32"]) == 0
    return home


@pytest.fixture(scope="module")
def results(home: Path) -> Path:
    """What the app wrote about two of these people and a label map."""
    raw = home / "raw"
    for subject in sorted((home / "bids").glob("sub-*"))[:2]:
        shutil.copytree(subject, raw / subject.name)
    folder = raw / "sub-labels" / "anat"
    folder.mkdir(parents=True)
    labels = np.zeros((48, 48, 48), np.int16)
    labels[12:36, 12:36, 12:36] = 3
    nib.save(nib.Nifti1Image(labels, np.diag([4.0, 4, 4, 1])), folder / "sub-labels_T1w.nii.gz")
    assert main([str(raw), str(home / "results"), "participant", "--model", str(home / "scalars")]) == 0
    return home / "results"


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", index_col="participant_id")


def test_the_app_answers_as_the_stages_do(home: Path, results: Path) -> None:
    places = ["--model", str(home / "scalars"), "--data", str(home / "packed"), "--out", str(home / "all.tsv")]
    assert mvhpc_main(["predict", *places, "--given", "image", "--want", "age,sex", "--split", "all"]) == 0
    staged, found = table(home / "all.tsv"), table(results / "predictions.tsv")
    answers = ["age", "age_sd", "age_q05", "age_q95", "sex", "sex_p_F", "typicality"]
    known = [key for key in found.index if key != "sub-labels"]
    pd.testing.assert_frame_equal(found.loc[known, answers], staged.loc[known, answers])
    assert len(known) == 2
    packed = open_dataset(home / "packed")
    learnt = [key for key in known if key not in packed.keys("test")]
    assert found.loc[learnt, "flag"].str.contains("the model learnt from this scan").all() and learnt
    about = json.loads((results / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"][0]["Name"] == "mvhpc"
    made = json.loads((results / "predictions.json").read_text())["GeneratedBy"]
    assert made["answered"]["people"] == 2 and made["answered"]["left_out"][0]["people"] == ["sub-labels"]
    assert "2 of 3 scans answered" in (results / "index.html").read_text()


def test_answers_to_another_query_are_set_aside(home: Path, results: Path) -> None:
    folder = shutil.copytree(results, home / "another")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    described = folder / "preprocessed" / "dataset_description.json"
    described.write_text(described.read_text().replace('"affine"', '"rigid"'))  # of a model with another recipe
    command = [str(home / "raw"), str(folder), "participant", "--model", str(home / "scalars"), "--want", "sex"]
    assert main(command) == 0
    assert '"rigid"' in (folder / "preprocessed.old-1" / described.name).read_text()
    for name in ("predictions.tsv", "predictions.json", "index.html", "sub-0001.html"):
        assert (folder / f"{name}.old-1").read_bytes() == before[name] != (folder / name).read_bytes()


def test_options_choose_files_and_columns_and_keep_suspects(
    home: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shutil.copytree(home / "raw", home / "derived")
    anat = raw / "sub-0001" / "anat"
    (anat / "sub-0001_T1w.nii.gz").rename(anat / "sub-0001_desc-preproc_T1w.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), anat / "sub-0001_desc-brain_T1w.nii.gz")
    (raw / "participants.tsv").write_text("participant_id\tgeschlecht\nsub-0001\tF\nsub-labels\tM\n")
    command = ["predict", "--bids", str(raw), "--out", str(home / "derived-out"), "--model", str(home / "scalars")]
    command += ["--given", "image,sex", "--want", "age", "--workers", "1"]
    assert mvhpc_main(command) == 2 and "sex" in capsys.readouterr().err
    command += ["--rename", "geschlecht=sex"]
    assert mvhpc_main(command) == 1  # nobody is answered
    found = table(home / "derived-out" / "predictions.tsv")
    assert found["age"].isna().all() and "choose by --entities" in found.loc["sub-0001", "flag"]
    (raw / "sub-labels" / "anat" / "sub-labels_T1w.nii.gz").rename(
        raw / "sub-labels" / "anat" / "sub-labels_desc-preproc_T1w.nii.gz"
    )
    assert mvhpc_main([*command, "--entities", "desc=preproc"]) == 0
    found = table(home / "derived-out" / "predictions.tsv")
    assert found.loc["sub-0001", "age"] > 0 and np.isnan(found.loc["sub-labels", "age"])
    assert mvhpc_main(["predict", "--bids", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(f"--{name}" in help_text for name in ("entities", "rename", "keep-suspect", "participant-label"))


def test_answers_about_other_scans_are_set_aside(home: Path, results: Path) -> None:
    folder = shutil.copytree(results, home / "elsewhere-out")
    before = (folder / "predictions.tsv").read_bytes()
    command = ["predict", "--bids", str(home / "raw"), "--out", str(folder), "--model", str(home / "scalars")]
    assert mvhpc_main(command) == 0  # the same scans
    assert not (folder / "predictions.tsv.old-1").exists()
    other = shutil.copytree(home / "raw", home / "elsewhere")  # other people who have the same labels
    assert mvhpc_main([*command[:2], str(other), *command[3:]]) == 0
    assert (folder / "predictions.tsv.old-1").read_bytes() == before


def test_what_cannot_be_answered_says_why(results: Path) -> None:
    row = table(results / "predictions.tsv").loc["sub-labels"]
    assert pd.isna(row["age"]) and pd.isna(row["sex"]) and row["flag"] != "ok"
    page = (results / "sub-labels.html").read_text()
    assert "not answered" in page and row["flag"].replace("'", "&#39;") in page
    group = (results / "index.html").read_text()
    assert all(f"{key}.html" in group and (results / f"{key}.html").is_file() for key in ("sub-labels", "sub-0001"))


def test_single_scans_from_python_have_the_same_answers(home: Path, results: Path) -> None:
    model = mvhpc.load(home / "scalars", "cpu")
    file = next((home / "raw" / "sub-0001" / "anat").glob("*.nii.gz"))
    expected = table(results / "predictions.tsv").loc["sub-0001"]
    assert model.predict(file, want=["age"])["age"] == pytest.approx(expected["age"], rel=1e-5)
    image = nib.load(file)
    again = model.predict(image.get_fdata(), {"sex": "F"}, ["age"], image.affine)
    other = model.predict(image.get_fdata(), {"sex": "M"}, ["age"], image.affine)
    assert again["age"] is not None and again["age"] != other["age"]
    with pytest.raises(ValueError, match="need their affine"):
        model.predict(image.get_fdata())


@pytest.mark.slow
def test_monai_starts_the_exported_model_on_a_raw_scan(home: Path, results: Path, tmp_path: Path) -> None:
    """With the recipe of the preprocessing, from another folder than the bundle's."""
    assert mvhpc_main(["export", str(home / "scalars"), str(tmp_path / "bundle")]) == 0
    scan = next((home / "raw" / "sub-0001" / "anat").glob("*.nii.gz"))
    start_bundle(tmp_path / "bundle", "--scan", str(scan), "--output", str(tmp_path / "answer.json"))
    answer = json.loads((tmp_path / "answer.json").read_text())
    expected = table(results / "predictions.tsv").loc["sub-0001"]
    assert answer["age"] == pytest.approx(expected["age"], rel=1e-4) and answer["flag"] == expected["flag"]
    recipe = json.loads((tmp_path / "bundle" / "configs" / "recipe.json").read_text())
    assert Recipe.from_dict(recipe) == RECIPE


def test_values_that_are_not_given_reject_nobody(
    home: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shutil.copytree(home / "raw" / "sub-0001", tmp_path / "raw" / "sub-0001").parent
    (raw / "participants.tsv").write_text("participant_id\tage\tsex\nsub-0001\t200\tX\n")
    command = ["predict", "--bids", str(raw), "--out", str(tmp_path / "out"), "--model", str(home / "scalars")]
    assert mvhpc_main(command) == 0
    assert "note: the true values of 1 rows cannot be read, the first of sub-0001: age" in capsys.readouterr().err
    found, expected = (table(path / "predictions.tsv").loc["sub-0001"] for path in (tmp_path / "out", results))
    assert found["age"] == expected["age"] and np.isnan(found["age_true"]) and np.isnan(found["sex_true"])
    assert mvhpc_main([*command, "--given", "image,age", "--want", "sex"]) == 1
    assert mvhpc_main([*command, "--given", "image,sex", "--want", "age"]) == 1
    assert "not answered: sub-0001: sex: unknown category 'X'" in capsys.readouterr().out  # the age is not given
    (raw / "participants.tsv").unlink()
    assert mvhpc_main([*command, "--given", "image,sex", "--want", "age"]) == 2
    assert "sex is given, and there is no" in capsys.readouterr().err


def test_an_unknown_participant_is_refused(home: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(home / "raw"), str(home / "other"), "participant", "--model", str(home / "scalars")]
    assert main([*places, "--participant-label", "0001", "nobody"]) == 2
    assert "no participant nobody" in capsys.readouterr().err
