"""The Python interface: it answers as the commands do, and the example notebook runs."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import mvhpc
from mvhpc.cli import main
from mvhpc.config import ConfigError
from mvhpc.evaluation.tables import read_predictions
from mvhpc.models.model_folder import ModelError
from mvhpc.pyfunc import PyfuncModel

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "python.ipynb"


def test_predictions_are_those_of_the_command(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    dataset, model = mvhpc.open_dataset(tiny_dataset), mvhpc.load(tiny_model, "cpu")
    rows = model.predict_people(dataset, given=["image", "sex"], want=["age"])
    places = ["--model", str(tiny_model), "--data", str(tiny_dataset), "--out", str(tmp_path / "a.tsv")]
    assert main(["predict", *places, "--split", "all", "--given", "image,sex", "--want", "age"]) == 0
    table = read_predictions(tmp_path / "a.tsv")[0].set_index("key")
    assert [row["key"] for row in rows] == dataset.keys() == list(table.index)
    np.testing.assert_allclose([row["age"] for row in rows], table["age"], rtol=1e-5)
    one = model.predict_people(dataset, ["image", "sex"], "age", "sub-03")  # a single name
    assert one == [row for row in rows if row["key"] == "sub-03"]
    some = dataset.keys("test")[1:3]
    assert [row["key"] for row in model.predict_people(tiny_dataset, ["image"], ["sex"], some)] == some
    with pytest.raises(ConfigError, match="unknown key 'sub-99'"):
        model.predict_people(dataset, ["image"], ["age"], ["sub-99"])


def test_synthetic_people_keep_what_is_given_and_depend_on_seed_and_number(tiny_model: Path) -> None:
    model = mvhpc.load(tiny_model, "cpu")
    one, two = model.generate(2, {"age": 70, "sex": "female"})
    assert (one["age"], one["sex"]) == (two["age"], two["sex"]) == (70, "F")
    assert (
        one["image"].shape == (16, 16, 16) and one["image"].min() >= 0 and not np.allclose(one["image"], two["image"])
    )
    (again,) = model.generate(1, {"age": 70, "sex": "F"})
    np.testing.assert_allclose(again["image"], one["image"], atol=1e-5)
    assert not np.allclose(model.generate(1, seed=1)[0]["image"], model.generate(1, seed=2)[0]["image"])
    with pytest.raises(ConfigError, match="age=170"):
        model.generate(1, {"age": 170})


def test_a_model_of_another_kind_is_refused(tiny_vae: Path, tiny_scalars: Path, tiny_early: Path) -> None:
    with pytest.raises(ModelError, match="run folder of stage scalars or joint"):
        mvhpc.load(tiny_vae)
    with pytest.raises(ModelError, match="kind joint is needed"):
        mvhpc.load(tiny_scalars).generate()
    with pytest.raises(ModelError, match="no model of scalars"):
        mvhpc.load(tiny_early).predict(np.zeros((8, 8, 8)), affine=np.eye(4))


def test_an_image_of_nibabel_is_read_as_its_file(tiny_bids: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    """With its header and scale; voxels whose phase would be dropped, an affine that would not be used, and an image
    that does not tell left from right are refused."""
    model, path = mvhpc.load(tiny_scalars), tiny_bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    assert model.predict(image) == model.predict(path)
    scaled = image.get_fdata() / image.get_fdata().max() * 200
    raw = bytearray(nib.Nifti1Image(scaled.astype(np.uint8), image.affine).to_bytes())
    raw[112:116] = np.float32(17.4).tobytes()  # scl_slope; nibabel would save the image with another one
    (tmp_path / "scaled.nii").write_bytes(raw)
    assert model.predict(nib.load(tmp_path / "scaled.nii")) == model.predict(tmp_path / "scaled.nii")
    image.header.set_xyzt_units("micron")
    assert "wrong units or affine" in model.predict(image)["flag"]
    for scan in (image, path):
        with pytest.raises(ValueError, match="has its own"):
            model.predict(scan, affine=np.eye(4))
    with pytest.raises(ValueError, match="complex voxels"):
        model.predict(image.get_fdata() * 1j, affine=image.affine)
    with pytest.raises(ValueError, match="Analyze format"):
        model.predict(nib.analyze.AnalyzeImage(np.zeros((4, 4, 4), np.int16), np.eye(4)))
    for affine in (np.eye(3), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="an affine of shape"):
            model.predict(image.get_fdata(), affine=affine)


def test_an_unknown_known_variable_is_refused(tiny_scalars: Path) -> None:
    model = mvhpc.load(tiny_scalars)
    for name, known in (("agee", "Did you mean 'age'"), ("image", "Known: age, sex")):
        with pytest.raises(ConfigError, match=f"unknown scalar '{name}'.*{known}"):
            model.predict("scan.nii", {name: 70})
        with pytest.raises(ConfigError, match=f"unknown scalar '{name}'.*{known}"):
            PyfuncModel(model).predict(pd.DataFrame({"scan": ["scan.nii"], name: [70]}))


def test_a_row_that_asks_for_nothing_costs_no_other_row_its_answer(tiny_bids: Path, tiny_scalars: Path) -> None:
    """In a table of MLflow; two columns of one name are refused, of which one would be taken without a word."""
    model, scan = PyfuncModel(mvhpc.load(tiny_scalars)), str(tiny_bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    table = pd.DataFrame(
        {"scan": [None, np.nan, scan, scan], "age": [np.nan, 50, 50, 50], "sex": [None, None, "F", ""]}
    )
    found = model.predict(table)
    assert found["flag"].tolist()[:3] == ["no scan", "no scan", "nothing to predict: every scalar is given"]
    assert found[["age", "sex"]].iloc[:3].isna().all(axis=None) and "scan" not in found["flag"][3]
    with pytest.raises(ConfigError, match="age: more than one column"):
        model.predict(pd.DataFrame([[scan, 40, 50]], columns=["scan", "age", "age"]))


def test_a_value_beyond_the_training_is_named_when_people_are_drawn(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mvhpc.load(tiny_model, "cpu").generate(1, {"age": 119})
    assert "warning: age 119 lies outside of the training's" in capsys.readouterr().err


def test_the_notebook_runs(
    tiny_dataset: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells in order, in one namespace, as a notebook runs them."""
    monkeypatch.setenv("MVHPC_MODEL", str(tiny_model))
    monkeypatch.setenv("MVHPC_DATA", str(tiny_dataset))
    content = json.loads(NOTEBOOK.read_text())
    names: dict[str, object] = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # no output of anybody's data
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)  # noqa: S102
    output = capsys.readouterr().out
    assert "12 records, 6 for testing, 8 mm" in output and output.count("90 % from") == 3
    assert output.count("70.0 F (16, 16, 16)") == 2
