"""What a stage shows while it runs: a progress bar, and a process that replays its journal into MLflow.

A stage writes its journal and knows neither of them.
"""

import importlib.metadata
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mvhpc.config import ConfigError, to_dict
from mvhpc.runs.clone import git
from mvhpc.runs.console import Console
from mvhpc.runs.folder import identity
from mvhpc.runs.journal import read
from mvhpc.runs.mlflow_replayer import Replayer, replayer
from mvhpc.runs.mlflow_store import SQLITE
from mvhpc.runs.mlflow_sync import REFUSED, absolute_store, read_state, record_end, relative_store, write_state
from mvhpc.runs.places import without_places
from mvhpc.runtime.watchdog import Interrupted
from shards.errors import DataError
from shards.index import Index

RUN_TYPES = {"predict": {"mlflow.runType": "evaluation"}}  # MLflow opens the pipeline that such a run is nested in
PIPELINE = "pipeline.run"  # run folder of a pipeline, below its root
PARENTS = 3  # folders above a run folder that are searched for it
PACKAGES = ("mvhpc", "torch", "monai", "deepspeed", "ray", "zarr", "mlflow", "numpy")


class Tracker:
    """Context around a stage: its progress bar and its MLflow run, both drawn from the journal.

    A stage that is started again with the same fingerprint goes on in the same MLflow run.

    Args:
        stage: the stage's name.
        config: its configuration; becomes the run's parameters, less ``tracking``, which names store and experiment.
        folder: the run folder.
        name: of the MLflow run.
        fingerprint: of everything that decides the stage's result.
        inputs: what the stage read, name -> identity of its content; tags that link the runs.
        data: folder of the packed volumes or latents that it read, or None.
        model: run folder of the model that it used, or None. Without ``tracking.uri`` the run goes to its store.

    Attributes:
        attempt: identity of this start of the stage.
        state: the content of ``tracking.json``.
        replayer: replays the journal into MLflow; None where MLflow is not installed.
        trained: the model that the stage trained, as :func:`mvhpc.runs.mlflow_store.log_model` takes it; set by the
            stage's end.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        folder: Path,
        *,
        name: str,
        fingerprint: str,
        inputs: Mapping[str, str],
        data: str | None = None,
        model: str | None = None,
    ) -> None:
        self.stage, self.folder, self.out = stage, folder, Path(config.out)
        self.attempt = uuid.uuid4().hex
        self.trained: dict[str, Any] = {}
        self._console = Console(stage, folder)
        state = read_state(folder)
        self._new = state.get("fingerprint") != fingerprint
        if self._new:
            state = {
                "identity": uuid.uuid4().hex,
                "fingerprint": fingerprint,
                "first_event": len(read(folder)),  # from there on the journal is this run's
                "start_time": int(1000 * time.time()),  # milliseconds, as MLflow counts
            }
        uri, experiment = config.tracking.uri, config.tracking.experiment
        if model and not uri:
            uri, experiment = store_of(Path(model)) or (uri, experiment)
        store = relative_store(uri, folder)
        uri = absolute_store(store, folder)
        root = Path(uri.removeprefix(SQLITE) if uri.startswith(SQLITE) else folder.resolve()).parent
        values = {key: value for key, value in to_dict(config).items() if key != "tracking"}
        self.state = state | {
            "attempt": self.attempt,
            "status": "RUNNING",
            "store": store,
            "experiment": experiment,
            "run_name": name,
            "config": without_places(values, root),
            "tags": {"stage": stage, "fingerprint": fingerprint, **versions()} | RUN_TYPES.get(stage, {}),
            "inputs": dict(inputs),
            "datasets": _datasets(Path(data), stage) if data else [],
            "parent": find_parent(folder) or (find_parent(Path(model)) if model else None),
        }
        if self.state["parent"]:
            above = Path(self.state["parent"]["folder"])
            self.state["parent"]["folder"] = os.path.relpath(above, folder.resolve())

    def __enter__(self) -> "Tracker":
        write_state(self.folder, self.state)
        self._console.start()
        self.replayer: Replayer | None = None
        if find_spec("mlflow") is None:  # prediction does without; `mvhpc mlflow-sync` sends the journal later
            print("not tracked: MLflow is not installed (pip install 'mvhpc[train]')", file=sys.stderr)
            return self
        self.replayer = replayer()
        self.replayer.begin(self.folder, self.attempt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        if kind is None:
            # inpainting with several samples writes NAME_1, NAME_2, ... and nothing called NAME
            outcome = {"output": identity(self.out)} if self.out.exists() else {}
            ending = {"status": "FINISHED", "outcome": outcome, "datasets": _datasets(self.out, "output")}
            ending |= {"model": self.trained} if self.trained else {}
        else:
            ending = {"status": status(kind, self._new), "outcome": {"error": kind.__name__}}
        finish(self.replayer, self.folder, self.attempt, ending)


def status(kind: type[BaseException], new: bool = False) -> str:
    """MLflow's word for how a stage ended that raised an exception of ``kind``; ``new``: it was started first here.

    A new stage whose query or input was refused has no run.
    """
    if new and issubclass(kind, ConfigError | DataError):
        return REFUSED
    return "FAILED" if issubclass(kind, Exception) and not issubclass(kind, Interrupted) else "KILLED"


def finish(process: Replayer | None, folder: Path, attempt: str, ending: dict[str, Any]) -> None:
    """Record how a stage ended, in its run folder and, by the process beside it, in its store."""
    if process is not None and ending["status"] == "KILLED":
        process.leave(ending)
    elif process is not None:
        process.end(folder, ending)
    if read_state(folder)["status"] == "RUNNING":  # the process did not live to record it
        record_end(folder, attempt, ending)


def store_of(model: Path) -> tuple[str, str] | None:
    """Tracking URI and experiment of the run that trained a model; None where it does not lie in its run folder."""
    for folder in (model, model.parent):
        state = read_state(folder)
        if state:
            return absolute_store(state["store"], folder), state["experiment"]
    return None


def find_parent(folder: Path) -> dict[str, str] | None:
    """Run folder and attempt of the pipeline that a run folder belongs to; None where it belongs to none."""
    for root in list(folder.resolve().parents)[:PARENTS]:
        above = root / PIPELINE
        if state := read_state(above):
            return {"folder": str(above), "attempt": state["attempt"]}
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, and the commit of this code where it runs from a clone."""
    tags = {"version.python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40").strip():
        tags["mlflow.source.git.commit"] = commit
    return tags


def _datasets(folder: Path, context: str) -> list[dict[str, str]]:
    """What MLflow keeps of a packed data set: one entry, or none where the folder is not packed data."""
    if not (folder / "index.json").is_file():
        return []
    index = Index.load(folder)
    parts = {name: dict(Counter(split.assignment.values())) for name, split in index.splits.items()}
    columns = [{"name": v.name, "type": v.kind, "required": False} for v in index.schema]
    return [
        {
            "context": context,
            "name": folder.name,
            "digest": index.digest[:36],  # MLflow's limit
            "source_type": "local",
            "source": json.dumps({"uri": folder.name}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps({"records": len(index.records), "arrays": index.arrays, "splits": parts}),
        }
    ]
