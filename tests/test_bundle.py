"""An exported model is whole: it loads where its run is gone, says what it is, knows an answer, and MONAI starts it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mvhpc
from mvhpc.cli import main
from mvhpc.export import export
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.models.bundle import load, save_baseline
from mvhpc.models.known_answer import FILE, ellipsoid
from mvhpc.models.model_folder import SUMS, ModelError
from shards.dataset import open_dataset
from shards.files import sha256
from shards.schema import Schema
from tests.test_predict import EXACT, configuration


@pytest.mark.parametrize("model", ["tiny_scalars", "tiny_model", "tiny_early"])
def test_an_exported_model_answers_as_its_run_does(request, model, tiny_dataset, tmp_path) -> None:
    source = request.getfixturevalue(model)
    out = tmp_path / "moved"
    assert main(["export", str(source), str(tmp_path / "export")]) == 0
    shutil.move(tmp_path / "export", out)
    for path in (source / "model").iterdir():
        assert (out / "model" / path.name).read_bytes() == path.read_bytes()
    query = {"given": ["image"], "want": ["age", "sex"], **({} if model == "tiny_early" else EXACT)}
    rows = [
        open_predictor(configuration(path, tiny_dataset, tmp_path / "a.tsv", **query))(["sub-01", "sub-02"])
        for path in (source, out)
    ]
    assert rows[0] == rows[1]
    assert Schema.from_dict(json.loads((out / "configs" / "schema.json").read_text())) == load(source).schema
    card = (out / "README.md").read_text()
    assert "6 people" in card and "not a medical device" in card and "sub-0" not in card
    if model == "tiny_scalars":
        config = (out / "configs" / "train.yaml").read_text()
        assert "epochs: 1" in config and str(tiny_dataset.parent) not in config


def test_another_answer_than_the_known_one_is_refused(tiny_scalars, tiny_dataset, tmp_path, capsys) -> None:
    """Weights that differ, with a manifest that fits them: what hashes cannot find."""
    out = tmp_path / "export"
    export(tiny_scalars, out)
    places = ["--model", str(out), "--data", str(tiny_dataset), "--given", "image", "--want", "age"]
    assert main(["predict", *places, "--split", "all", "--out", str(tmp_path / "a.tsv")]) == 0
    manifest = out / "model" / "model.json"
    meta = json.loads(manifest.read_text())
    entry = meta["networks"]["linear-0"]
    weights = load_file(out / "model" / entry["file"])
    save_file(weights | {"image.mean": weights["image.mean"] + 0.1}, out / "model" / entry["file"])
    entry["sha256"] = sha256(out / "model" / entry["file"])
    manifest.write_text(json.dumps(meta))
    (out / SUMS).unlink()
    assert main(["predict", *places, "--split", "all", "--out", str(tmp_path / "b.tsv")]) == 2
    assert f"{FILE}: the model answers" in capsys.readouterr().err
    (out / FILE).write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        open_predictor(configuration(out, tiny_dataset, tmp_path / "b.tsv", given=["image"], want=["age"], **EXACT))


def test_the_input_of_the_known_answer_is_the_same_everywhere() -> None:
    """It is recorded as a hash; its arithmetic is that of integers."""
    x = ellipsoid((6, 7, 8))
    assert x.shape == (6, 7, 8) and x.dtype is torch.uint8
    assert int(x.sum()) == 17248 and not x[0].any()


@pytest.fixture
def tiny_baseline(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A run folder of an untrained baseline, on the grid of ``tiny_dataset`` made larger."""
    from mvhpc.models.baseline import Baseline, scalars_of

    dataset = open_dataset(tiny_dataset)
    schema, given = dataset.index.schema, ["image", "sex"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Baseline(scalars_of(schema, [*given, "age"], {}), given, "age")
    grid = {**dataset.index.grid, "shape": [32, 32, 32]}
    folder = tmp_path / "baseline"
    save_baseline(
        folder / "model",
        network.state_dict(),
        given=given,
        want="age",
        name="densenet",
        settings=None,
        schema=schema,
        intervals={},
        grid=grid,
    )
    return folder


def test_an_exported_baseline_and_autoencoder_are_whole(tiny_baseline, tiny_vae, tmp_path) -> None:
    export(tiny_baseline, tmp_path / "out")
    known = json.loads((tmp_path / "out" / FILE).read_text())
    assert list(known["answer"]) == ["age"] and known["input"]["shape"] == [32, 32, 32]
    config = json.loads((tmp_path / "out" / "configs" / "inference.json").read_text())
    assert (config["given"], config["want"]) == (["image", "sex"], ["age"])
    assert mvhpc.load(tmp_path / "out", "cpu").schema == load(tiny_baseline).schema
    export(tiny_vae, tmp_path / "vae")
    files = {str(path.relative_to(tmp_path / "vae")) for path in (tmp_path / "vae").rglob("*") if path.is_file()}
    assert {f for f in files if not f.startswith("model/")} == {"README.md", "configs/metadata.json", SUMS}


def test_a_damaged_file_of_an_exported_model_is_refused_by_name(tiny_scalars: Path, tmp_path: Path) -> None:
    """Also where the damaged ``model.json`` can be read: women would be called men. Programs find the other files."""
    out = tmp_path / "export"
    export(tiny_scalars, out)
    for path in (out / "model").iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"F"', b'"M"').replace(b'"M"', b'"F"', 1) if path.suffix == ".json" else b"")
        with pytest.raises(ModelError, match=f"{path.name}: damaged"):
            load(out)
        path.write_bytes(content)
    load(out)
    check = ["sha256sum", "--check", "--quiet", SUMS]
    assert subprocess.run(check, cwd=out, check=False).returncode == 0
    (out / "configs" / "schema.json").write_text("{}")
    assert subprocess.run(check, cwd=out, check=False, capture_output=True).returncode == 1


@pytest.mark.slow
def test_monai_starts_the_bundle_and_it_answers(tiny_early, tiny_dataset, tmp_path) -> None:
    """Of a model without a model of scalars, about packed data; tests/test_bids_app.py has that of a raw scan."""
    export(tiny_early, tmp_path / "model")
    start_bundle(tmp_path / "model", "--data", str(tiny_dataset), "--want", "['sex']", "--output", "rows.json")
    rows = json.loads((tmp_path / "model" / "rows.json").read_text())
    assert rows == mvhpc.load(tiny_early, "cpu").predict_people(tiny_dataset, ["image"], ["sex"])


def start_bundle(folder: Path, *arguments: str) -> None:
    """Run a bundle by MONAI's command, inside its folder."""
    pytest.importorskip("fire")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
