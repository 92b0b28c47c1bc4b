"""A run folder and what surrounds every stage: configuration, journal, log, tracking, and the mark of completeness."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError, fingerprint, to_dict, to_yaml
from mvhpc.journal import Journal
from mvhpc.training.agreement import agree_with_newest
from shards.files import write_text, write_whole
from shards.index import Index

FOLDERS = {"vae", "joint", "baseline"}  # stages whose output is the run folder itself
# Of `compute`: where a stage runs, which changes its result by rounding at most. A job goes on with the nodes it gets.
LAYOUT = ("workers", "zero_stage", "offload", "threads", "retries", "hang_minutes")


class Interrupted(RuntimeError):
    """A stage stopped on request, its state in a checkpoint; the same command goes on from there."""


class Run:
    """What a stage writes to beside its result.

    Attributes:
        folder: the run folder.
        journal: metrics and figures in the order they came; the tracker and the progress bar follow it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder)

    @contextlib.contextmanager
    def figure(self, name: str, step: int = 0) -> Iterator[Path]:
        """The path of ``figures/NAME`` to write a picture to; journalled once it is written."""
        path = self.folder / "figures" / name
        path.parent.mkdir(exist_ok=True)
        yield path
        self.journal.write("artifact", step=step, path=str(path.relative_to(self.folder)))


def run_folder(stage: str, out: str) -> Path:
    """Where a stage keeps its configuration, journal and log: its output folder, or ``OUT.run`` beside the output."""
    path = Path(out)
    return path if stage in FOLDERS else path.with_name(path.name + ".run")


def identity(path: str | Path) -> str:
    """What the content of an input is, whatever it is called: shards, a trained model, a BIDS tree or a file.

    Raises:
        FileNotFoundError: naming the path, where there is nothing.
    """
    path = Path(path)
    if (path / "index.json").is_file():
        index = Index.load(path)
        return fingerprint(index.digest, {name: split.assignment for name, split in index.splits.items()})
    for model in (path / "model" / "model.json", path / "model.json", path):
        if model.is_file():
            return hashlib.sha256(model.read_bytes()).hexdigest()[:16]
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
        table = path / "participants.tsv"
        return fingerprint(files, table.read_text() if table.is_file() else "")
    raise FileNotFoundError(f"{path}: no such file or folder")


def stage_fingerprint(stage: str, config: Any, inputs: dict[str, str]) -> str:
    """Identifies a stage's result: its configuration less what cannot change the result, and its inputs' content."""
    decisive = {k: v for k, v in to_dict(config).items() if k not in {"out", "tracking", *inputs}}
    for key in LAYOUT:
        decisive.get("compute", {}).pop(key, None)
    return fingerprint(stage, decisive, inputs)


def record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``stage.json``; empty where no stage was ever started there."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextlib.contextmanager
def alone(folder: Path, patience: float = 120.0) -> Iterator[None]:
    """Nobody else executes a stage in ``folder`` meanwhile.

    By a lock of the file system, which ends with this process however that ends; where there are no such locks, not at
    all.

    Args:
        folder: a run folder.
        patience: seconds until a server of files has noticed that a node died which held the lock.

    Raises:
        ConfigError: another process is at work there.
    """
    host = f"host {socket.gethostname()}"
    with (folder / ".lock").open("a+") as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read() or "another process"
                if holder.endswith(host) or time.monotonic() > end:
                    raise ConfigError(
                        f"{folder}: {holder} is at work there; wait for its end, or stop it and run this again"
                    ) from error
                time.sleep(1)
            except OSError:  # no such locks here
                break
        with contextlib.suppress(OSError):  # a full disc is the stage's own affair
            file.truncate(0)
            file.write(f"process {os.getpid()} of {host}")
            file.flush()
        yield


@contextlib.contextmanager
def library_noise(log: Path) -> Iterator[None]:
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


def execute(stage: str, config: Any) -> dict[str, Any]:
    """Run one stage whole: prepare its folder, do it, track it, and mark it complete.

    Args:
        stage: a name in :data:`mvhpc.stages.STAGES`.
        config: its configuration.

    Returns:
        The stage's summary: metric name -> number.

    Raises:
        ConfigError: another process is at work in this folder.
        whatever the stage raises; its traceback is in the run folder's ``log.txt``.
    """
    from mvhpc.stages import STAGES
    from mvhpc.tracking import Tracker

    definition = STAGES[stage]
    inputs = {name: identity(getattr(config, name)) for name in definition.inputs if getattr(config, name)}
    folder = run_folder(stage, config.out)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    mark: dict[str, Any] = {"stage": stage, "fingerprint": stage_fingerprint(stage, config, inputs), "inputs": inputs}
    run = Run(folder)
    start = time.time()
    with alone(folder), library_noise(folder / "log.txt"):
        if stage in FOLDERS:
            agree_with_newest(folder, config)
        recorded = [path for path in (folder / "stage.json", folder / "config.yaml") if path.is_file()]
        before = {path: path.read_bytes() for path in recorded}
        write_text(folder / "stage.json", json.dumps({**mark, "status": "running"}, indent=1))
        write_text(folder / "config.yaml", to_yaml(config))
        tracker = Tracker(
            stage,
            config,
            folder,
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            inputs=inputs,
            data=getattr(config, "latents", None) or getattr(config, "data", None),
        )
        try:
            with tracker:
                summary = definition.function()(config, run)
                run.journal.write("summary", metrics=summary)
        except BaseException as error:
            with (folder / "log.txt").open("a") as log:
                log.write(traceback.format_exc())
            if isinstance(error, ConfigError | FileExistsError):  # refused: what is here is as it was recorded
                for path, content in before.items():
                    write_whole(path, content)
            raise
        mark |= {"status": "finished", "summary": summary, "seconds": round(time.time() - start, 1)}
        write_text(folder / "stage.json", json.dumps(mark, indent=1))
    return summary
