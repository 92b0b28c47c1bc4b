"""What an MLflow store is told of a run; every call may be repeated."""

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
METRICS, PARAMETERS = 1000, 100  # per request, MLflow's limits
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds; its default of 120, five times over, is for people who wait
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # its records go where ours go
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}  # where somebody asked for it


@functools.cache
def store_client(uri: str) -> "MlflowClient":
    """A client of the store with that tracking URI."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # a second or two

    return MlflowClient(uri)


def open_run(client: "MlflowClient", uri: str, state: dict[str, Any]) -> dict[str, str]:
    """The experiment and the run, found where an earlier attempt got as far as making them."""
    experiment = client.get_experiment_by_name(state["experiment"])
    if experiment is not None:
        number = experiment.experiment_id
    else:
        artifacts = Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" if uri.startswith(SQLITE) else None
        number = client.create_experiment(
            state["experiment"],
            artifacts and artifacts.as_uri(),
            tags={"mlflow.experimentKind": "custom_model_development"},  # its pages open on runs, not on chats
        )
    found = client.search_runs([number], f"tags.identity = '{state['id']}'", max_results=1)
    run = found[0] if found else client.create_run(number, state["start"], {"identity": state["id"]}, state["name"])
    return {"experiment_id": number, "run": run.info.run_id}


def describe(client: "MlflowClient", state: dict[str, Any]) -> None:
    """Parameters, configuration, versions, data, and the runs that made the inputs."""
    from mlflow.entities import Param

    run = state["run"]
    parameters = [Param(name, str(value)) for name, value in _flat(state["config"]).items()]
    for i in range(0, len(parameters), PARAMETERS):
        client.log_batch(run, params=parameters[i : i + PARAMETERS])
    client.log_text(run, yaml.safe_dump(state["config"], sort_keys=False), "config.yaml")
    _tag(client, run, state["tags"] | {f"input.{name}": value for name, value in state["inputs"].items()})
    _log_datasets(client, run, state["datasets"])
    links = []
    for name, value in state["inputs"].items():
        makers = client.search_runs(
            [state["experiment_id"]], f"tags.output = '{value}'", order_by=["start_time DESC"], max_results=1
        )
        links += [
            f"{name}: [{m.info.run_name}](#/experiments/{m.info.experiment_id}/runs/{m.info.run_id})" for m in makers
        ]
    if links:
        _tag(client, run, {"mlflow.note.content": "Made from " + ", ".join(links)})


def as_metrics(event: dict[str, Any]) -> dict[str, Any]:
    """The summary of a stage as metrics of step 0; any other event as it is."""
    if event["event"] != "summary":
        return event
    metrics = {f"summary/{k.replace('/', '_')}": v for k, v in event["metrics"].items() if isinstance(v, int | float)}
    return event | {"event": "metrics", "step": 0, "metrics": metrics}


def send(client: "MlflowClient", run: str, folder: Path, events: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    points = [
        Metric(re.sub(r"[^\w\-. :/]", "_", name), float(value), int(1000 * event["time"]), event["step"])
        for event in events
        if event["event"] == "metrics"
        for name, value in event["metrics"].items()
    ]
    for i in range(0, len(points), METRICS):
        client.log_batch(run, metrics=points[i : i + METRICS])
    pictures = dict.fromkeys(event["path"] for event in events if event["event"] == "artifact")
    for path in map(Path, pictures):
        if (folder / path).is_file():
            client.log_artifact(run, str(folder / path), path.parent.as_posix() if path.parent.name else None)


def tell(client: "MlflowClient", state: dict[str, Any]) -> None:
    """How the stage ended, or that it goes on again."""
    if state["status"] == "RUNNING":
        client.update_run(state["run"], status="RUNNING")
        return
    _tag(client, state["run"], state["made"])
    _log_datasets(client, state["run"], state["datasets"])
    client.set_terminated(state["run"], state["status"], state["end"])


def _tag(client: "MlflowClient", run: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])


def _log_datasets(client: "MlflowClient", run: str, datasets: list[dict[str, str]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run,
        [
            DatasetInput(
                Dataset(**{k: v for k, v in d.items() if k != "context"}),
                [InputTag("mlflow.data.context", d["context"])],
            )
            for d in datasets
        ],
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
