"""Which runs a store has: stages nested in their pipeline, none of refused questions, all of a model in its store."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mvhpc.config import ConfigError, load_config
from mvhpc.execute import execute, plan
from mvhpc.inference.predictor import PredictConfig
from mvhpc.runs.journal import Journal
from mvhpc.runs.mlflow_store import BEST, SCORE, save_view, store_client
from mvhpc.runs.mlflow_sync import REFUSED, read_state, record_kill, relative_store, sync, synced, write_state
from mvhpc.runs.pipeline_run import PipelineRun
from mvhpc.runs.tracker import PIPELINE
from tests.test_mlflow import losses, track


@pytest.fixture(autouse=True)
def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages start no process beside them: the tests send what it would have sent."""
    monkeypatch.setattr("mvhpc.runs.tracker.find_spec", lambda name: None)
    monkeypatch.setattr("mvhpc.runs.pipeline_run.find_spec", lambda name: None)


def runs_of(root: Path) -> list[Any]:
    client = store_client(f"sqlite:///{root / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name("laws").experiment_id]))


@pytest.mark.slow
def test_stages_are_nested_in_the_run_of_their_pipeline_in_every_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "results.md").write_text("| given | age error |\n")
    with PipelineRun(tmp_path, {"preset": "demo"}, store, "laws") as pipeline:
        with track(tmp_path):
            losses(tmp_path, range(2))
            Journal(tmp_path / "packed.run").write("summary", metrics={"test/age_mae": 9.0})
        sync(tmp_path / "packed.run")
        pipeline.changed = True
        pipeline.results({"image and sex": {"test/age_mae": 9.0, "test/age_mae_low": 8.0, "network_calls": 1}})
        pipeline.run.keep(tmp_path / "results.md", "results")
    sync(tmp_path / PIPELINE)
    other = f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"
    sync(tmp_path / "packed.run", other)  # takes the pipeline's run with it
    for root in (tmp_path, tmp_path / "other"):
        above, below = sorted(runs_of(root), key=lambda run: run.info.run_name != tmp_path.name)
        assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert (above.info.status, below.info.status) == ("FINISHED", "FINISHED")
        assert above.data.metrics == {"test/age_mae given image and sex": 9.0}
        client = store_client(f"sqlite:///{root / 'mlflow.db'}")
        assert [file.path for file in client.list_artifacts(above.info.run_id, "results")] == ["results/results.md"]

    before = read_state(tmp_path / PIPELINE)
    with PipelineRun(tmp_path, {"preset": "demo"}, store, "laws"):
        pass  # every stage was complete
    assert read_state(tmp_path / PIPELINE) == before
    key = save_view(store_client(store), above.info.experiment_id)
    tag = store_client(store).get_experiment(above.info.experiment_id).tags[f"mlflow.sharedViewState.{key}"]
    assert json.loads(json.loads(tag)["state"])["selectedColumns"] == ["metrics.`test/age_mae`"]


def test_a_pipeline_is_killed_with_its_stage(tmp_path: Path) -> None:
    pipeline = PipelineRun(tmp_path, {}, "", "laws")
    write_state(tmp_path / PIPELINE, pipeline.state)
    stage = track(tmp_path)
    write_state(tmp_path / "packed.run", stage.state)
    record_kill(tmp_path / "packed.run", stage.attempt)
    assert read_state(tmp_path / PIPELINE)["status"] == read_state(tmp_path / "packed.run")["status"] == "KILLED"


@pytest.mark.slow
def test_a_refused_query_leaves_no_run_and_a_failure_does(tmp_path: Path) -> None:
    folder = tmp_path / "packed.run"
    with track(tmp_path):
        losses(tmp_path, range(1))
    sync(folder)
    with pytest.raises(ConfigError), track(tmp_path, seed=1):
        sync(folder)  # the process beside the stage was fast
        raise ConfigError("no such variable")
    assert read_state(folder)["status"] == REFUSED
    sync(folder)
    assert [run.info.status for run in runs_of(tmp_path)] == ["FINISHED"] and not synced(folder)
    with pytest.raises(OSError), track(tmp_path, seed=2):
        raise OSError("disk full")
    sync(folder)
    assert sorted(run.info.status for run in runs_of(tmp_path)) == ["FAILED", "FINISHED"]


def test_predictions_go_to_the_store_of_their_model(tmp_path: Path, tiny_scalars: Path, tiny_dataset: Path) -> None:
    values = {"model": str(tiny_scalars), "data": str(tiny_dataset), "out": str(tmp_path / "age.tsv")}
    values |= {"want": ["age"], "given": ["image"], "compute.device": "cpu"}
    execute(plan("predict", load_config(PredictConfig, "predict", values=values)))
    state = read_state(tmp_path / "age.tsv.run")
    assert state["store"] == relative_store(f"sqlite:///{tiny_scalars.parent / 'mlflow.db'}", tmp_path / "age.tsv.run")
    assert state["run_name"] == "age | image (age)"
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_a_trained_model_is_registered_and_answers_from_paths(tmp_path: Path, tiny_scalars: Path) -> None:
    """It answers as the run folder does, is registered once where a note is lost, and the best one has the alias.

    Its run is named after a time and a person.
    """
    import mlflow

    from mvhpc.api import load

    folder, uri = shutil.copytree(tiny_scalars, tmp_path / "run"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    state = read_state(folder)
    write_state(folder, state | {"model": state["model"] | {"name": "10:15-o'brien 1.2"}})
    sync(folder, uri)
    for note in folder.glob("tracking.*.json"):
        note.unlink()
    sync(folder, uri)
    client, name = store_client(uri), "10_15-o_brien 1_2"
    assert [run.info.status for run in client.search_runs(["1"])] == ["FINISHED"]
    (version,) = client.search_model_versions(f"name = '{name}'")
    worse = client.create_model_version(name, version.source, version.run_id, tags={**version.tags, SCORE: "1e9"})
    assert client.get_model_version_by_alias(name, BEST).version == version.version != worse.version

    scan = str(tiny_scalars.parent / "bids" / "sub-00" / "anat" / "sub-00_T1w.nii.gz")
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{name}@{BEST}")
        answers = model.predict(pd.DataFrame({"scan": [scan, scan], "sex": ["F", None]}))
    finally:
        mlflow.set_tracking_uri(None)
    assert model.metadata.flavors["python_function"]["loader_module"] == "mvhpc.pyfunc"
    assert list(model.input_example.columns) == ["scan"]
    assert [spec.name for spec in model.metadata.signature.outputs] == list(answers.columns)
    ours = load(tiny_scalars)
    for row, given in zip(answers.to_dict("records"), ({"sex": "F"}, {})):
        assert {k: v for k, v in row.items() if not pd.isna(v)} == {
            k: v for k, v in ours.predict(scan, given).items() if k in row and v is not None
        }
    assert not [path for path in (tmp_path / "mlartifacts").rglob("*") if path.suffix in {".pkl", ".py", ".pickle"}]
