"""The whole pipeline, small: every stage for real, then again."""

import json
from pathlib import Path

import pytest

from mvhpc.config import load_config
from mvhpc.pipeline.plan import PipelineConfig
from mvhpc.pipeline.run import run_pipeline

SMALL = {
    "queries": [{"want": ["age"], "given": ["image", "sex"]}, {"want": ["sex"], "given": []}],
    "phantom": {"subjects": 16, "shape": [16, 16, 16]},
    "pack": {"spacing": 12.0, "shape": [16, 16, 16], "workers": 1},
    "vae": {
        "model": {"channels": [8, 8, 8, 8], "norm_groups": 4},
        "training": {"epochs": 1},
        "compute": {"workers": 1},
    },
    "scalars": {
        "encoder": {"channels": [8, 8], "embedding": 8, "ensemble_members": 2},
        "training": {"epochs": 1, "batch": 4},
        "compute": {"workers": 1},
    },
    "joint": {
        "model": {"channels": [16, 16], "head_channels": 16, "embedding": 16},
        "training": {"epochs": 2, "batch": 4, "validate_every": 1},
        "compute": {"workers": 1},
    },
    "generate": {"count": 2, "sampling": {"steps": 2, "stride": 500}},
}


def configuration(root: Path, **changes: dict) -> PipelineConfig:
    return load_config(PipelineConfig, "pipeline", "demo", (), {"root": str(root), **SMALL, **changes})


@pytest.mark.slow
def test_pipeline_from_nothing_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages leave what they promise; run again each is reused; a changed one and what depends on it are not."""
    root = tmp_path / "demo"
    pipeline = run_pipeline(configuration(root))
    printed = capsys.readouterr()
    for row in ("image, sex", "nothing", "predicting the mean", "best possible, given image, sex"):
        assert row in printed.out
    (verdict,) = (line for line in printed.out.splitlines() if line.startswith("age given image, sex: "))
    assert "better than predicting the mean (gain " in verdict and verdict in (root / "results.md").read_text()
    assert {p.stem for p in (root / "figures").iterdir()} == {
        "reconstruction",
        "people",
        "inpainted-half",
        "drawn-over-age",
        "ventricles-over-age",
    }
    stages = [stage for stage, _ in pipeline.steps()]
    assert stages == ["phantom", "pack", "scalars", "vae", "encode", "joint", "predict", "predict", "generate"]
    weights = (root / "joint" / "model" / "model.json").read_bytes()

    run_pipeline(configuration(root))
    assert capsys.readouterr().err.count("reused") == len(stages)

    other = {**SMALL["joint"], "training": {**SMALL["joint"]["training"], "seed": 1}}
    run_pipeline(configuration(root, joint=other))
    printed = capsys.readouterr().err
    assert printed.count("reused") == 5  # all before the joint model
    assert printed.count("set aside") == 4  # the joint model and its predictions
    assert (root / "joint.old-1" / "model" / "model.json").read_bytes() == weights
    assert (root / "joint" / "model" / "model.json").read_bytes() != weights
    record = json.loads((root / "joint" / "stage.json").read_text())
    assert record["status"] == "finished"
