"""What a stage shows while it runs: a progress bar, and a process that replays its journal into MLflow.

A stage writes its journal and knows neither of them.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mvhpc.config import to_dict
from mvhpc.runs.console import Console
from mvhpc.runs.folder import identity
from mvhpc.runs.journal import read
from mvhpc.runs.mlflow_replayer import Replayer, replayer
from mvhpc.runs.mlflow_store import SQLITE
from mvhpc.runs.mlflow_sync import absolute_store, read_state, record_end, relative_store, write_state
from mvhpc.runtime.watchdog import Interrupted
from shards.index import Index

PACKAGES = ("mvhpc", "torch", "monai", "deepspeed", "ray", "zarr", "mlflow", "numpy")


class Tracker:
    """Context around a stage: its progress bar and its MLflow run, both drawn from the journal.

    A stage that is started again with the same fingerprint goes on in the same MLflow run.

    Args:
        stage: the stage's name.
        config: its configuration; becomes the run's parameters, less ``tracking``, which names store and experiment.
        folder: the run folder.
        fingerprint: of everything that decides the stage's result.
        inputs: what the stage read, name -> identity of its content; tags that link the runs.
        data: folder of the packed volumes or latents that it read, or None.

    Attributes:
        attempt: identity of this start of the stage.
        state: the content of ``tracking.json``.
        replayer: replays the journal into MLflow; None where MLflow is not installed.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        folder: Path,
        *,
        fingerprint: str,
        inputs: Mapping[str, str],
        data: str | None = None,
    ) -> None:
        self.stage, self.folder, self.out = stage, folder, Path(config.out)
        self.attempt = uuid.uuid4().hex
        self._console = Console(stage, folder)
        state = read_state(folder)
        if state.get("fingerprint") != fingerprint:
            state = {
                "identity": uuid.uuid4().hex,
                "fingerprint": fingerprint,
                "first_event": len(read(folder)),  # from there on the journal is this run's
                "start_time": int(1000 * time.time()),  # milliseconds, as MLflow counts
            }
        store = relative_store(config.tracking.uri, folder)
        uri = absolute_store(store, folder)
        root = Path(uri.removeprefix(SQLITE) if uri.startswith(SQLITE) else folder.resolve()).parent
        values = {key: value for key, value in to_dict(config).items() if key != "tracking"}
        self.state = state | {
            "attempt": self.attempt,
            "status": "RUNNING",
            "store": store,
            "experiment": config.tracking.experiment,
            "run_name": _run_name(stage, self.out, root),
            "config": _without_places(values, root),
            "tags": {"stage": stage, "fingerprint": fingerprint, **_versions()},
            "inputs": dict(inputs),
            "datasets": _datasets(Path(data), stage) if data else [],
        }

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
        else:
            failed = issubclass(kind, Exception) and not issubclass(kind, Interrupted)
            ending = {"status": "FAILED" if failed else "KILLED", "outcome": {"error": kind.__name__}}
        if self.replayer is not None and ending["status"] == "KILLED":
            self.replayer.leave(ending)
        elif self.replayer is not None:
            self.replayer.end(self.folder, ending)
        if read_state(self.folder)["status"] == "RUNNING":  # the process did not live to record it
            record_end(self.folder, self.attempt, ending)


def _run_name(stage: str, out: Path, root: Path) -> str:
    """``vae`` for a result of that name, else the stage and its result: ``predict: age-given-image``."""
    name = _below(out.resolve().with_suffix(""), root).replace("predictions/", "")  # lists cut long names
    return stage if name == stage else f"{stage}: {name}"


def _without_places(value: Any, root: Path) -> Any:
    """``value`` with absolute paths, which name machines and people, cut to the part below ``root`` or the last one."""
    if isinstance(value, dict):
        return {key: _without_places(v, root) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v, root) for v in value]
    return _below(Path(value), root) if isinstance(value, str) and Path(value).is_absolute() else value


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _versions() -> dict[str, str]:
    """Versions of the packages that decide a result, and the commit of this code where it runs from a clone."""
    tags = {"version.python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    clone = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git and (clone / ".git").exists():
        command = [git, "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            tags["mlflow.source.git.commit"] = done.stdout.strip()
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
