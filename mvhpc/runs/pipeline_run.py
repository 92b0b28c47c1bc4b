"""The MLflow run of a pipeline, in which the runs of its stages are nested."""

import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mvhpc.runs.folder import Run
from mvhpc.runs.journal import read
from mvhpc.runs.mlflow_replayer import replayer
from mvhpc.runs.mlflow_sync import read_state, relative_store, write_state
from mvhpc.runs.places import without_places
from mvhpc.runs.tracker import PIPELINE, finish, status, versions

SHOWN = ("_mae", "_accuracy", "_crps", "_in_90")  # of the summary of a prediction


class PipelineRun:
    """Context around a pipeline. Its run folder is ``ROOT/pipeline.run``; a project has one, however often it is run.

    No process follows its journal while stages run: their own processes open its run, and the last one sends the rest.

    Args:
        root: of the project.
        config: of the pipeline, a mapping; the parameters of the run.
        uri: of the store; empty: ``mlflow.db`` in ``root``.
        experiment: of the store.

    Attributes:
        run: its run folder.
        changed: whether a stage ran or the results are new; otherwise nothing is sent.
    """

    def __init__(self, root: Path, config: dict[str, Any], uri: str, experiment: str) -> None:
        self.run = Run(root / PIPELINE)
        self.changed = False
        self._before = read_state(self.run.folder)
        self.attempt = uuid.uuid4().hex
        begun = {"identity": uuid.uuid4().hex, "first_event": 0, "start_time": int(1000 * time.time())}
        self.state = (self._before or begun) | {
            "attempt": self.attempt,
            "status": "RUNNING",
            "store": relative_store(uri or "", self.run.folder),
            "experiment": experiment,
            "run_name": root.resolve().name,
            "config": without_places(config),
            "tags": {"stage": "pipeline", **versions()},
            "inputs": {},
            "datasets": [],
        }

    def __enter__(self) -> "PipelineRun":
        write_state(self.run.folder, self.state)
        return self

    @property
    def reported(self) -> bool:
        """Whether results were journaled, by any call."""
        return any(event["event"] == "summary" for event in read(self.run.folder))

    def results(self, summaries: dict[str, dict[str, Any]]) -> None:
        """Journal what the stages found; the latest results are those of the last step.

        Args:
            summaries: what is given, as ``image and sex``, -> summary of the prediction.
        """
        step = sum(event["event"] == "summary" for event in read(self.run.folder))
        metrics = {
            f"{name} given {given}": value
            for given, summary in summaries.items()
            for name, value in summary.items()
            if name.endswith(SHOWN)
        }
        self.run.journal.write("summary", step=step, metrics=metrics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.changed and self._before.get("status") == "FINISHED":
            write_state(self.run.folder, self._before)
            return
        ending: dict[str, Any] = {"status": "FINISHED", "outcome": {}}
        if kind is not None:
            ending = {
                "status": status(kind, not self._before and not self.changed),
                "outcome": {"error": kind.__name__},
            }
        process = replayer() if find_spec("mlflow") else None
        if process is not None:
            process.begin(self.run.folder, self.attempt)
        finish(process, self.run.folder, self.attempt, ending)
