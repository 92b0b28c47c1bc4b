"""Requests to an MLflow store: open a run, describe it, send metrics and figures, set its status.

Every request may be repeated. ``state`` is the content of a run folder's ``tracking.json``; see
:mod:`mvhpc.runs.mlflow_sync`.
"""

import json
import os
import posixpath
import re
import socket
import sqlite3
import tempfile
import textwrap
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from mvhpc.config import flatten
from shards.files import lock_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
PARENT = "mlflow.parentRunId"
BEST, SCORE = "best", "validation_loss"  # alias and tag of a registered model's version
PATIENCE_S = 300.0  # for another process that creates the tables of a store
ERROR = "error"  # tag of a run that failed: the name of the exception
VIEW, VIEWED = "mvhpc-results", 200  # key of the dashboard's view; newest runs whose metrics are its columns
RESULTS = ("_mae", "_accuracy", "_in_90", "validation/loss")  # ends of the names of the metrics that are columns
METRICS, PARAMETERS = 1000, 100  # per request, MLflow's limits
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds; by default a request may take 120, and is repeated five times
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # log records go to the run folder's log.txt
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_clients: dict[str, "MlflowClient"] = {}  # by tracking URI
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}  # of `mvhpc mlflow-sync`


def store_client(uri: str) -> "MlflowClient":
    """A client of the store with that tracking URI.

    Raises:
        BlockingIOError: another process has been creating the tables of an sqlite store for minutes.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if uri not in _clients:
        _clients[uri] = _connect(uri)
    return _clients[uri]


def open_databases() -> list[str]:
    """Paths of the sqlite stores that this process has clients of."""
    return [uri.removeprefix(SQLITE) for uri in _clients if uri.startswith(SQLITE)]


def _connect(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient  # takes seconds

    if not uri.startswith(SQLITE):
        return MlflowClient(uri)
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    # The first client creates the tables, and fails where two processes do that at the same time.
    with lock_file(database.with_name(f".{database.name}.lock"), PATIENCE_S, required=False):
        return MlflowClient(uri)


def open_run(client: "MlflowClient", uri: str, state: dict[str, Any], parent: str) -> dict[str, str]:
    """Experiment and run of ``state``, found by name and identity, created where they are missing.

    Only one process at a time may call this for one run: MLflow cannot search and create in one step. ``parent`` is the
    run that a new run is nested in, or empty.

    Returns:
        ``experiment_id`` and ``run_id``.
    """
    experiment = _open_experiment(client, uri, state["experiment"])
    found = client.search_runs([experiment], f"tags.identity = '{state['identity']}'", max_results=1)
    run = found[0] if found else _create_run(client, experiment, state, parent)
    return {"experiment_id": experiment, "run_id": run.info.run_id}


def _create_run(client: "MlflowClient", experiment: str, state: dict[str, Any], parent: str) -> Any:
    tags = {"identity": state["identity"]} | ({PARENT: parent} if parent else {})
    return client.create_run(experiment, state["start_time"], tags, state["run_name"])


def _open_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" if uri.startswith(SQLITE) else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # its pages open on runs, not on chats
        try:
            return client.create_experiment(name, artifacts and artifacts.as_uri(), tags=tags)
        except MlflowException:  # another run's process created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    number: str = found.experiment_id
    return number


def describe(client: "MlflowClient", run_id: str, experiment_id: str, state: dict[str, Any]) -> None:
    """Send parameters, configuration, versions, data sets, and links to the runs that made the inputs."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params  # a parameter cannot be changed
    values = {_allowed(name): str(value) for name, value in flatten(state["config"]).items()}
    parameters = [Param(name, value) for name, value in values.items() if name not in known]
    for i in range(0, len(parameters), PARAMETERS):
        client.log_batch(run_id, params=parameters[i : i + PARAMETERS])
    client.log_text(run_id, yaml.safe_dump(state["config"], sort_keys=False), "config.yaml")
    _tag(client, run_id, state["tags"] | {f"input.{name}": value for name, value in state["inputs"].items()})
    _log_datasets(client, run_id, state["datasets"])
    links = []
    for name, value in state["inputs"].items():
        found = client.search_runs(
            [experiment_id], f"tags.output = '{value}'", order_by=["start_time DESC"], max_results=1
        )
        links += [f"{name}: [{r.info.run_name}](#/experiments/{experiment_id}/runs/{r.info.run_id})" for r in found]
    if links:
        _tag(client, run_id, {"mlflow.note.content": "Made from " + ", ".join(links)})


def send_events(client: "MlflowClient", run_id: str, folder: Path, events: list[dict[str, Any]]) -> None:
    """Send the metrics, tags and files of journal events with MLflow's names; ``folder`` is the run folder."""
    from mlflow.entities import Metric

    points = [
        Metric(_allowed(name), float(value), int(1000 * event["time"]), event["step"])
        for event in events
        if event["event"] == "metrics"
        for name, value in event["metrics"].items()
    ]
    for i in range(0, len(points), METRICS):
        client.log_batch(run_id, metrics=points[i : i + METRICS])
    tags = [event["tags"] for event in events if event["event"] == "tags"]
    if tags:
        _tag(client, run_id, {_allowed(name): text for each in tags for name, text in each.items()})
    files = {event["path"]: event.get("folder", "") for event in events if event["event"] == "artifact"}
    for path, target in files.items():
        if (folder / path).is_file():
            client.log_artifact(run_id, str(folder / path), target or _parent(path))


def _allowed(name: str) -> str:
    """A name that MLflow takes, of the same words: of some characters, and no path that can be written shorter."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name))


def _parent(path: str) -> str | None:
    return str(Path(path).parent) if "/" in path else None


def send_status(client: "MlflowClient", run_id: str, state: dict[str, Any]) -> None:
    """Set the run's status; of a stage that ended also its outcome."""
    if state["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
        return
    if ERROR not in state["outcome"] and ERROR in client.get_run(run_id).data.tags:  # of an earlier start
        client.delete_tag(run_id, ERROR)
    _tag(client, run_id, state["outcome"])
    _log_datasets(client, run_id, state["datasets"])
    client.set_terminated(run_id, state["status"], state["end_time"])


def remove_run(client: "MlflowClient", run_id: str) -> None:
    """Move a run to the store's bin."""
    client.delete_run(run_id)


def log_model(client: "MlflowClient", run_id: str, experiment_id: str, folder: Path, model: dict[str, Any]) -> None:
    """Store a model that ``mlflow.pyfunc.load_model`` opens, register it as a new version, and find the best one.

    Only a module of this package is named in it: nothing of the store is executed, and nothing is unpickled. The alias
    ``best`` is given to the version of the lowest score among those of the same data.

    Args:
        client: of the store.
        run_id: run that trained the model.
        experiment_id: its experiment.
        folder: the run folder.
        model: ``name`` of the registered model, where MLflow has ``_`` for all but letters, digits, spaces and ``-``;
            ``path`` of its folder, relative to the run folder; ``loader``, a module with ``_load_pyfunc``;
            ``signature`` as MLflow's ``ModelSignature.to_dict``; ``example``, column -> value; ``requirements``;
            ``data``, identity of the data and the split; ``score``, smaller is better.
    """
    name = re.sub(r"[^\w -]", "_", model["name"])
    tags = {"data": model["data"], SCORE: f"{model['score']:.8g}"}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    if client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return
    stored = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    for half in (m for m in stored if m.status != "READY"):  # of a process that was killed
        client.delete_logged_model(half.model_id)
    logged = next((m for m in stored if m.status == "READY"), None)
    logged = logged or _upload_model(client, run_id, experiment_id, folder, model | {"name": name}, tags)
    # A database is asked by this process, which looks "models:/" up in its own default store.
    local = client.tracking_uri.startswith(SQLITE)
    source = logged.artifact_location if local else f"models:/{logged.model_id}"
    client.create_model_version(name, source, run_id, tags=tags, model_id=None if local else logged.model_id)
    versions = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("data") == model["data"]]
    best = min(versions, key=lambda v: (float(v.tags[SCORE]), -int(v.version)))
    client.set_registered_model_alias(name, BEST, best.version)


def _upload_model(
    client: "MlflowClient", run_id: str, experiment_id: str, folder: Path, model: dict[str, Any], tags: dict[str, str]
) -> Any:
    """Store a model as an output of its run; see :func:`log_model`."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model

    logged = client.create_logged_model(experiment_id, name=model["name"], source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        path = Path(parent) / "model"
        save_model(
            path,
            loader_module=model["loader"],
            data_path=str(folder / model["path"]),
            signature=ModelSignature.from_dict(model["signature"]),
            input_example=pd.DataFrame([model["example"]]),
            pip_requirements=model["requirements"],
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
        )
        client.log_model_artifacts(logged.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def save_view(client: "MlflowClient", experiment_id: str) -> str:
    """Save the view of an experiment that the dashboard opens: runs with their results as columns, as they are now.

    MLflow keeps a view as a tag of the experiment, and lists it in the menu "Views".

    Returns:
        Its key, for ``viewStateShareKey`` of a link.
    """
    runs = client.search_runs([experiment_id], max_results=VIEWED)
    found = {name for run in runs for name in run.data.metrics}
    columns = [f"metrics.`{name}`" for name in sorted(found) if name.endswith(RESULTS)]
    state = json.dumps({"selectedColumns": columns, "runsHiddenMode": "FIRST_20_RUNS"})
    view = {"name": "Results", "createdAt": 0, "updatedAt": 0, "state": state}
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    return VIEW


def _tag(client: "MlflowClient", run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _log_datasets(client: "MlflowClient", run_id: str, datasets: list[dict[str, str]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for entry in datasets:
        fields = dict(entry)
        context = InputTag("mlflow.data.context", fields.pop("context"))
        inputs.append(DatasetInput(Dataset(**fields), [context]))
    client.log_inputs(run_id, inputs)


def explain(error: BaseException) -> str:
    """Why a store does not take what is sent, in words: the deepest cause that says so."""
    if isinstance(error, BlockingIOError):
        return "another process is writing to it"
    for cause in reversed(_causes(error)):
        if isinstance(cause, TimeoutError):
            return "no answer in time"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}{f': {cause.filename}' if cause.filename else ''}"
        if isinstance(cause, sqlite3.Error):
            return str(cause)
    answer = re.search(r"error code (\d{3}) ", str(error))
    if answer and int(answer[1]) in set(HTTPStatus):
        status = HTTPStatus(int(answer[1]))
        remedy = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if status == 401 else ""
        return f"the server answers {status.value} {status.phrase}{remedy}"
    return (
        textwrap.shorten(str(error), 200, placeholder=" ...") or f"an error without a message, {type(error).__name__}"
    )


def unreachable(error: BaseException) -> bool:
    """Whether the server of a store did not answer at all."""
    return any(isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes
