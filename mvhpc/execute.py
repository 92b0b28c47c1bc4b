"""Runs one stage: run folder, lock, journal, tracking, and the record of its completion."""

import contextlib
import json
import logging
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mvhpc.checkpoints.compatibility import check_newest
from mvhpc.config import ConfigError, decisive, fingerprint, to_yaml
from mvhpc.runs.folder import Run, description, exclusive, identity, read_record
from mvhpc.runs.journal import read
from mvhpc.runs.tracker import Tracker
from mvhpc.runtime.importing import resolve
from mvhpc.runtime.interrupts import no_interrupt_is_lost
from mvhpc.stages import STAGES, Stage
from shards.files import free_suffix, is_complete, rename_aside, write_bytes, write_text
from shards.schema import Schema

# Not moved when an outdated result is set aside: the launcher's files, the lock, and answers of models (`evaluate`).
KEPT = ("jobs", ".lock", "answers")


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its configuration and the identity of its result.

    Attributes:
        stage: its entry in the table.
        config: its configuration.
        inputs: key -> identity of the input's content; of a missing input, the recorded one.
        missing: key -> path of missing inputs.
        fingerprint: of everything that decides the result.
    """

    stage: Stage
    config: Any
    inputs: Mapping[str, str]
    missing: Mapping[str, str]
    fingerprint: str

    @property
    def out(self) -> Path:
        """Path of its result."""
        return Path(self.config.out)

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.stage.run_folder(self.out)

    def state(self) -> str:
        """State of the result.

        Returns:
            ``finished``, ``running`` (started with this configuration and these inputs), ``changed`` (other settings or
            inputs, or made anew by another command), ``unknown`` (content without a record: this stage did not make it)
            or ``new``.
        """
        record = read_record(self.folder)
        if not record:
            return "unknown" if self._has_content() else "new"
        if record["fingerprint"] != self.fingerprint:
            return "changed"
        if not self.files[0].exists():
            return "new"
        if not self.stage.trains:  # a model's folder also holds predictions, which have descriptions of their own
            described = description(self.out)
            if record.get("description", described) != described:
                return "changed"
        if record["status"] == "running" and self.has_result():
            return "finished"
        status: str = record["status"]
        return status

    @property
    def files(self) -> list[Path]:
        """Paths of its result, the first of which every result has."""
        return list(resolve(self.stage.files)(self.config)) if self.stage.files else [self.out]

    def _has_content(self) -> bool:
        """Whether a path of the result has content, apart from files of the job that makes it."""
        if self.out != self.folder:
            return any(path.exists() for path in self.files)
        return self.out.is_dir() and any(child.name not in KEPT for child in self.out.iterdir())

    def has_result(self) -> bool:
        """Whether a complete folder of results exists.

        A stage does not start if one exists, and a folder appears complete: if the record is ``running``, the folder is
        that stage's. This does not hold for a file, which may be of an earlier query, nor for training, which has
        checkpoints.
        """
        return not self.stage.trains and self.out.is_dir() and is_complete(self.out)

    def mark_finished(self, summary: Mapping[str, Any] = MappingProxyType({}), seconds: float = 0.0) -> None:
        """Record that the stage is finished."""
        finished = {"status": "finished", "summary": dict(summary), "seconds": round(seconds, 1)}
        finished["description"] = description(self.out)
        write_text(self.folder / "stage.json", json.dumps({**self.record(), **finished}, indent=1))

    def record(self) -> dict[str, Any]:
        """The identity of the stage, as recorded in ``stage.json``."""
        return {"stage": self.stage.name, "fingerprint": self.fingerprint, "inputs": dict(self.inputs)}

    def summary(self) -> dict[str, Any]:
        """The summary that the stage reported; empty before it is finished."""
        found: dict[str, Any] = read_record(self.folder).get("summary", {})
        return found

    def check_inputs(self) -> None:
        """Check that all inputs exist.

        Raises:
            ConfigError: naming the first missing key and path.
        """
        for key, path in self.missing.items():
            maker = self.stage.inputs[key]
            how = f"; stage {maker} makes it" if maker and maker != "phantom" else ""  # real scans are no phantoms
            raise ConfigError(f"{key}={path}: no such file or folder (is its file system mounted?){how}")


def plan(name: str, config: Any) -> PlannedStage:
    """Determine the identity of a stage's result. The inputs are read once, here.

    Args:
        name: of the stage.
        config: its configuration.
    """
    stage = STAGES[name]
    recorded = read_record(stage.run_folder(config.out)).get("inputs", {})
    named = getattr(config, "split_name", getattr(config, "split", "default"))
    split = named if isinstance(named, str) else "default"  # of a packing it is the shares of the parts
    files_root = getattr(config, "files_root", "")
    inputs, missing = {}, {}
    for key in stage.inputs:
        paths = getattr(config, key)
        several = isinstance(paths, list)
        if not paths:
            continue
        try:
            found = [identity(path, split, files_root) for path in (paths if several else [paths])]
            inputs[key] = fingerprint(found) if several else found[0]
        except FileNotFoundError as error:
            missing[key] = error.filename
            inputs[key] = recorded.get(key, "")
    keys = {key: value for key, value in decisive(config).items() if key not in stage.inputs}
    if keys.get("schema"):  # its content counts, not the name of its file
        keys["schema"] = Schema.load(keys["schema"]).to_dict()
    return PlannedStage(stage, config, inputs, missing, fingerprint(stage.name, keys, inputs))


def execute(planned: PlannedStage) -> dict[str, Any]:
    """Run one stage: prepare its folder, run and track it, and record its completion.

    Returns:
        The stage's summary: metric name -> number.

    Raises:
        ConfigError: an input is missing, or another process works in this folder.
        FileExistsError: a folder of results exists.
        Exception: as the stage raises; its traceback is in the run folder's ``log.txt``. The record of an earlier
            result stays, unless training continued from it.
    """
    stage, config, folder = planned.stage, planned.config, planned.folder
    planned.check_inputs()
    if reconcile(planned):
        return planned.summary()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    run = Run(folder)
    start = time.monotonic()
    with exclusive(folder), library_logs(folder / "log.txt"), no_interrupt_is_lost():
        if stage.trains:
            check_newest(folder, config)
        elif planned.has_result():
            raise FileExistsError(f"{planned.out} exists already; remove it or choose another name (out=...)")
        files = (folder / "stage.json", folder / "config.yaml", folder / "tracking.json")
        before = {path: path.read_bytes() for path in files if path.is_file()}
        begun = _starts(folder)
        try:
            write_text(files[0], json.dumps({**planned.record(), "status": "running"}, indent=1))
            write_text(files[1], to_yaml(config))
            tracker = Tracker(
                stage.name,
                config,
                folder,
                name=stage.run_name(config),
                fingerprint=planned.fingerprint,
                inputs=dict(planned.inputs),
                data=getattr(config, "latents", None) or getattr(config, "data", None),
                model=config.model if "model" in stage.inputs else None,
            )
            with tracker:
                summary = run_stage(stage, config, run)
                run.journal.write("summary", metrics=summary)
                tracker.trained = _trained(planned, summary) if stage.trains else {}
                # Before the slow MLflow, so that the stage counts as finished if the process is killed there.
                planned.mark_finished(summary, time.monotonic() - start)
        except BaseException as error:
            with (folder / "log.txt").open("a") as log:
                log.write("interrupted\n" if isinstance(error, KeyboardInterrupt) else traceback.format_exc())
            if _starts(folder) == begun and read_record(folder).get("status") == "running":
                for path, content in before.items():
                    write_bytes(path, content)
            raise
    return summary


def run_stage(stage: Stage, config: Any, run: Run) -> dict[str, Any]:
    """Call the stage's function, or train its task."""
    if stage.trains:
        from mvhpc.training.run import run_training  # imports torch

        return dict(run_training(stage.task, config, run))
    summary: dict[str, Any] = resolve(stage.run)(config, run)
    return summary


def _trained(planned: PlannedStage, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a training, as MLflow registers it; nothing for a model that does not predict from a scan."""
    from mvhpc.inference.model_signature import describe_model  # imports torch

    described = describe_model(planned.folder / "model")
    if not described or "validation/loss" not in summary:
        return {}
    data = "+".join(planned.inputs[key] for key in ("latents", "data") if key in planned.inputs)
    name = "-".join(planned.out.resolve().parts[-2:])
    return {"name": name, "path": "model", "data": data, "score": summary["validation/loss"], **described}


def _starts(folder: Path) -> int:
    """Number of times that training was started or resumed there."""
    return sum(event["event"] == "start" for event in read(folder))


def reconcile(planned: PlannedStage) -> bool:
    """Complete the record if a process was killed after it wrote the result; return whether it was."""
    if planned.state() != "finished" or read_record(planned.folder)["status"] == "finished":
        return False
    with exclusive(planned.folder):
        planned.mark_finished()
    return True


def set_aside(planned: PlannedStage) -> None:
    """Rename the files of an outdated result, and its run folder, to ``NAME.old-N``.

    Raises:
        ConfigError: another process works there.
    """
    folder = planned.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive(folder):
        if planned.out != folder:
            rename_aside([path for path in planned.files if path.exists()])
        outdated = [child for child in folder.iterdir() if child.name not in KEPT]
        if outdated:
            old = folder.with_name(folder.name + free_suffix([folder]))
            old.mkdir(mode=0o700)
            # The record goes last and says that the result is not finished: killed in between, the stage begins anew.
            record, path = read_record(folder), folder / "stage.json"
            write_text(path, json.dumps({**record, "status": "running"}, indent=1))
            for child in outdated:
                if child != path:
                    child.rename(old / child.name)
            write_text(old / path.name, json.dumps(record, indent=1))
            path.unlink()


@contextlib.contextmanager
def library_logs(log: Path) -> Iterator[None]:
    """Send warnings and log records of libraries to ``log`` instead of the screen."""
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        handler.close()
