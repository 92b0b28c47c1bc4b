"""The whole pipeline, small: every stage for real, then again."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mvhpc.cli import main
from mvhpc.config import ConfigError, load_config
from mvhpc.execute import plan
from mvhpc.inference.prediction_tables import write_predictions
from mvhpc.pipeline.plan import FINAL, Pipeline, PipelineConfig
from mvhpc.pipeline.report import write_report
from mvhpc.pipeline.run import run_pipeline
from mvhpc.pipeline.summary import table_of_results
from mvhpc.runs.journal import read
from mvhpc.runs.mlflow_store import store_client
from mvhpc.runs.tracker import PIPELINE
from shards.dataset import open_dataset
from shards.index import Index

SMALL = {
    "queries": [{"want": ["age"], "given": ["image", "sex"]}, {"want": ["sex"], "given": []}],
    "phantom": {"subjects": 16, "shape": [16, 16, 16]},
    "pack": {"spacing": 12.0, "shape": [16, 16, 16], "split": [0.5, 0.1, 0.4], "workers": 1},  # six for testing
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


@pytest.mark.parametrize(
    ("recorded", "flags", "reason"),
    [
        (["F", "M"], ["ok; sex is not predicted: all have F", "sex is not predicted: all have F; far"], "sex is not"),
        (["F", None], ["nothing that is given is known", "ok"], "nothing that is given is known"),
        (["F", "M"], ["failed: one", "failed: other"], "nobody is answered; the column flag of the table"),
        ([None, None], ["ok", "ok"], "nobody of the test part has a recorded sex"),
    ],
)
def test_a_query_without_a_score_says_why(
    tiny_dataset: Path, tmp_path: Path, recorded: list, flags: list[str], reason: str
) -> None:
    pipeline = Pipeline(configuration(tmp_path, queries=[{"want": ["sex"], "given": ["image"]}], source="none"))
    shutil.copytree(tiny_dataset, pipeline.place("pack", FINAL))
    keys = open_dataset(tiny_dataset).keys("test")[:2]
    columns = {"sex": None, "sex_p_F": None, "sex_p_M": None}
    rows = [
        {"key": key, "subject": key, **columns, "sex_true": true, "flag": flag}
        for key, true, flag in zip(keys, recorded, flags)
    ]
    (query,) = pipeline.config.queries
    path = pipeline.predictions(FINAL, query)
    path.parent.mkdir(parents=True)
    write_predictions(path, rows, open_dataset(tiny_dataset).index.schema, {"given": ["image"], "want": ["sex"]})
    _, (verdict,) = table_of_results(pipeline)
    assert verdict.startswith("sex given image: no score, as ") and reason in verdict and " far" not in verdict


def check_store(root: Path) -> None:
    """One run of the pipeline has those of all stages below it, the results and pictures; models are registered."""
    client = store_client(f"sqlite:///{root / 'mlflow.db'}")
    above, *below = sorted(client.search_runs(["1"]), key=lambda run: run.info.run_name != root.name)
    names = ["age | image, sex", "encode", "generate", "joint", "pack", "phantom", "scalars", "sex | nothing", "vae"]
    assert sorted(run.info.run_name for run in below) == names
    assert {run.data.tags["mlflow.parentRunId"] for run in below} == {above.info.run_id}
    assert {run.info.status for run in (above, *below)} == {"FINISHED"}
    assert set(above.data.metrics) >= {"test/age_mae given image and sex", "test/sex_accuracy given nothing"}
    groups = {name.partition("/")[0] for run in below for name in run.data.metrics}
    assert groups == {"loss", "optimizer", "system", "test", "validation"}
    files = {f.path for folder in ("results", "figures") for f in client.list_artifacts(above.info.run_id, folder)}
    assert {"results/results.md", "figures/inpainted-half.png", "figures/people.png"} <= files
    (predict,) = (run for run in below if run.info.run_name == "age | image, sex")
    tables = {file.path for file in client.list_artifacts(predict.info.run_id, "predictions")}
    assert tables == {f"predictions/age-given-image-sex.{end}" for end in ("tsv", "json")}
    assert {model.name for model in client.search_registered_models()} == {f"{root.name}-joint", f"{root.name}-scalars"}


def check_report(root: Path, out: Path) -> None:
    """The page has every part, agrees with ``results.md``, loads nothing and names no folder of this machine."""
    assert main(["report", str(root), "--out", str(out)]) == 0
    page = out.read_text()
    for cell in (root / "results.md").read_text().splitlines()[2].strip("| ").split(" | "):
        assert f">{cell}<" in page
    for text in ("figure B.1", "figure B.2", "Calibrated on", "Intended use", "rows of the source were rejected"):
        assert text in page
    index = Index.load(root / "packed")
    assert all(file["sha256"] in page for file in index.files.values())
    assert "<code>mvhpc calibrate</code>" in page and "`" not in page
    assert "<script" not in page and str(root.parent) not in page
    assert not re.findall(r"(?:src|href)=.(?!data:|#)", page)
    (root / "joint" / "stage.json").rename(root / "stage.json")
    with pytest.raises(ConfigError, match="not complete: joint"):
        write_report(root, out)
    (root / "stage.json").rename(root / "joint" / "stage.json")
    with pytest.raises(ConfigError, match=r"no project .*project\.yaml"):
        write_report(root / "joint", out)


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

    check_store(root)
    check_report(root, tmp_path / "report.html")
    run_pipeline(configuration(root))
    assert capsys.readouterr().err.count("reused") == len(stages)
    shutil.rmtree(root / PIPELINE)  # as where jobs have run all stages
    run_pipeline(configuration(root))
    events = read(root / PIPELINE)
    assert "../results.md" in [event["path"] for event in events if event["event"] == "artifact"]
    (found,) = (event["metrics"] for event in events if event["event"] == "summary")
    assert {"test/age_mae given image and sex", "test/sex_accuracy given nothing"} <= found.keys()
    count = len(events)
    run_pipeline(configuration(root))
    assert len(read(root / PIPELINE)) == count
    capsys.readouterr()
    copied = shutil.copytree(root, tmp_path / "copied", copy_function=shutil.copyfile)  # without the times of files
    assert {plan(*step).state() for step in Pipeline(configuration(copied)).steps()} == {"finished"}

    other = {**SMALL["joint"], "training": {**SMALL["joint"]["training"], "seed": 1}}
    run_pipeline(configuration(root, joint=other))
    printed = capsys.readouterr().err
    assert printed.count("reused") == 5  # all before the joint model
    assert printed.count("set aside") == 4  # the joint model and its predictions
    assert (root / "joint.old-1" / "model" / "model.json").read_bytes() == weights
    assert (root / "joint" / "model" / "model.json").read_bytes() != weights
    record = json.loads((root / "joint" / "stage.json").read_text())
    assert record["status"] == "finished"
