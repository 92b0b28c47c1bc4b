"""Variables are configuration: two contrasts, sites, a score, sex as a number, and nothing but the volume."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from mvhpc.config import ConfigError, load_config
from mvhpc.evaluation.tables import read_predictions
from mvhpc.execute import execute, plan
from mvhpc.models.bundle import load
from mvhpc.pipeline.run import run_pipeline
from mvhpc.stages import STAGES
from mvhpc.variables import Continuous
from shards.dataset import open_dataset
from tests.test_pipeline import SMALL, configuration

FEW = {"sampling.steps": 2, "sampling.stride": 500}


def do(stage: str, preset: str = "default", **values: object) -> dict:
    config = load_config(
        STAGES[stage].config_class(), stage, preset, (), {k.replace("__", "."): v for k, v in values.items()}
    )
    return execute(plan(stage, config))


def test_a_translated_tree_is_one_whatever_subjects_are_called(
    tiny_model: Path, tiny_bids: Path, tmp_path: Path
) -> None:
    from shards.pack import pack

    names = {f"sub-{i:02d}": f"sub-ADNI_S_{i}" for i in range(12)}
    tree = shutil.copytree(tiny_bids, tmp_path / "bids")
    for path in sorted(tree.rglob("sub-*"), reverse=True):  # what is in a folder before the folder
        path.rename(path.with_name(path.name.replace(path.name[:6], names[path.name[:6]])))
    table = tree / "participants.tsv"
    for old, new in names.items():
        table.write_text(table.read_text().replace(f"{old}\t", f"{new}\t"))
    schema = load(tiny_model).schema
    options = {
        "storage": "zarr",
        "schema": schema,
        "max_rejects": "0",
        "fractions": (0.4, 0.1, 0.5),
        "keep_suspect": True,
    }
    pack(tree, tmp_path / "packed", spacing=8.0, shape=(16, 16, 16), **options)
    places = {"model": str(tiny_model), "data": str(tmp_path / "packed"), "out": str(tmp_path / "t1w")}
    made = do("translate", given=["age", "sex"], want="image", **places, **FEW)
    keys = open_dataset(tmp_path / "packed").keys()  # the names are new to the model
    written = sorted(str(p.relative_to(tmp_path / "t1w")) for p in (tmp_path / "t1w").rglob("*.nii.gz"))
    assert written == sorted(f"{key}/anat/{key}_space-T1w_desc-synthetic_T1w.nii.gz" for key in keys)
    assert made["subjects"] == len(keys) > 0


@pytest.mark.slow
def test_schemas_need_no_line_of_code(tmp_path: Path) -> None:
    root = tmp_path / "rich"
    queries = [
        {"want": ["memory", "site", "age"], "given": ["image", "sex"]},
        {"want": ["memory"], "given": ["age", "t2w"]},
    ]
    rich = {"phantom": {**SMALL["phantom"], "rich": True}, "pack": {**SMALL["pack"], "schema": "rich"}}
    run_pipeline(configuration(root, **rich, queries=queries, predict={"draws": 5}))
    frame, description = read_predictions(root / "predictions" / "memory-site-age-given-image-sex.tsv")
    assert description["network_calls"] == 1
    assert frame[[f"site_p_{s}" for s in ("Arden", "Birch", "Cedar", "Doone", "Elmet")]].sum(axis=1).to_numpy() == (
        pytest.approx(1, abs=1e-5)
    )
    assert (frame["memory_q50"] == frame["memory_q50"].round()).all() and not (frame["memory"] % 1 == 0).all()
    draws = pd.read_csv(root / "predictions" / "memory-site-age-given-image-sex.draws.tsv", sep="\t")
    assert (
        list(draws) == ["participant_id", "session_id", "draw", "memory", "site", "age"]
        and (draws["memory"] % 1 == 0).all()
    )
    tree = root / "synthetic"
    assert len(list(tree.rglob("*_T2w.nii.gz"))) == len(list(tree.rglob("*_T1w.nii.gz"))) == 2

    common = {"model": root / "joint", "data": root / "packed", **FEW}
    common = {k: str(v) if isinstance(v, Path) else v for k, v in common.items()}
    made = do("translate", out=str(tmp_path / "t2w"), given=["image", "age"], want="t2w", batch=2, **common)
    files = sorted((tmp_path / "t2w").rglob("*_desc-synthetic_T2w.nii.gz"))
    assert len(files) == made["subjects"] and 0 < made["ssim"] < 1
    scores = pd.read_csv(tmp_path / "t2w" / "scores.tsv", sep="\t")
    assert scores["not_given"].isna().sum() == made["with_all_given"] and len(scores) == made["subjects"]
    assert scores["ssim"][scores["not_given"].isna()].mean() == pytest.approx(made["ssim"], rel=1e-4)
    again = do("translate", out=str(tmp_path / "again"), given=["image", "age"], want="t2w", batch=1, **common)
    assert again["psnr_db"] == pytest.approx(made["psnr_db"], rel=1e-4)
    about = json.loads((tmp_path / "t2w" / "dataset_description.json").read_text())
    assert about["GeneratedBy"][0]["Given"] == ["image", "age"]
    assert np.abs(nib.load(files[0]).get_fdata()).max() <= 1
    with pytest.raises(ConfigError, match="Did you mean 't2w'"):
        do("translate", out=str(tmp_path / "x"), given=["image"], want="t2", **common)
    with pytest.raises(ConfigError, match="both given and wanted"):
        do("translate", out=str(tmp_path / "x"), given=["t2w"], want="t2w", **common)

    small = {f"model.{k}": v for k, v in SMALL["joint"]["model"].items()}
    few = {"training.epochs": 1, "training.batch": 4, "compute.workers": 1}
    small |= {"latents": str(root / "latents"), "vae": str(root / "vae"), "scalars": "", **few}
    for schema, names in (("image-only", ["image"]), ("continuous-sex", ["image", "age", "sex"])):
        folder = tmp_path / schema
        if len(names) > 1:
            small["scalars"] = str(tmp_path / "scalars")
            do("scalars", "demo", out=small["scalars"], data=str(root / "packed"), schema=schema, **few)
        do("joint", "demo", out=str(folder), schema=schema, **small)
        model = load(folder)
        assert model.variables.names == names
        people = do("generate", out=str(tmp_path / f"{schema}-people"), model=str(folder), count=2, **FEW)
        assert people["people"] == 2
    assert isinstance(model.variables["sex"], Continuous)
