"""MLflow, fed from a run folder's journal by a process of its own.

A stage writes its journal and knows nothing of MLflow. Beside it a small process replays the journal into the store,
so that a dead server, a locked database or a slow import costs the training nothing. What could not be sent stays in
the run folder for the next :func:`sync`: at the end of the stage, at its next start, or whenever it is called.

``tracking.json`` in the run folder holds what the store should know beyond the journal, and how much it knows.
Sending is repeatable: the run is found again by an identity chosen here, a metric carries the journal's time (MLflow
keeps an equal point once), and of the steps that a resumed run goes through twice the first pass counts.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from mvhpc.config import to_dict
from mvhpc.runs.folder import identity
from mvhpc.runs.journal import follow, read, unseen
from mvhpc.runs.mlflow_store import SQLITE, as_metrics, describe, open_run, send, store_client, tell
from mvhpc.runtime.watchdog import Interrupted
from shards.files import write_text
from shards.index import Index
from shards.progress import Progress

STATE = "tracking.json"
KNOWN = ("run", "experiment_id", "sent", "described", "told")  # of a state: what one store knows
PERIOD_S = 3.0  # between two replays
GRACE_S = 60.0  # how long a stage that has ended waits for the last replay
NOTE = {
    "train/loss": "loss {:.4g}",
    "train/grad_norm": "gradient {:.3g}",
    "train/lr": "rate {:.2g}",
    "system/samples_per_second": "{:.3g} samples/s",
    "system/model_tflops": "{:.3g} TFLOP/s",
    "system/utilisation_percent": "{:.0f} % used",
    "system/data_wait_percent": "{:.0f} % waiting",
    "system/memory_gib": "{:.1f} GiB",
    "system/gpu_memory_gib": "{:.1f} GiB on the GPU",
}
PACKAGES = ["mvhpc", "torch", "monai", "deepspeed", "ray", "zarr", "mlflow", "numpy"]


class Tracker:
    """Context around a stage: its progress bar and its MLflow run, both drawn from the journal.

    Args:
        stage: the stage's name.
        config: its configuration; becomes the run's parameters, less ``tracking``, which names the store (an empty URI:
            ``mlflow.db``, sqlite, beside the run folder) and the experiment.
        folder: the run folder.
        fingerprint: of everything that decides the stage's result.
        inputs: what the stage read, name -> identity of its content; tags that link the runs.
        data: folder of the packed volumes or latents that it read, or None.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        folder: Path,
        *,
        fingerprint: str,
        inputs: dict[str, str],
        data: str | None = None,
    ) -> None:
        self.stage, self.folder, self.out = stage, folder, Path(config.out)
        self._stop = threading.Event()
        self._bar = threading.Thread(target=self._draw, daemon=True)
        uri, root = _store(config.tracking.uri, folder)
        old = _state(folder) if (folder / STATE).is_file() else {}
        same = old.get("fingerprint") == fingerprint
        if not same or old["uri"] != uri:
            # Another result, or another store for the same one: a new MLflow run, from where the journal is its own.
            begin = old["begin"] if same else len(read(folder))
            old = {"id": uuid.uuid4().hex, "start": _now(), "begin": begin, "sent": 0, "described": False}
        values = {k: v for k, v in to_dict(config).items() if k != "tracking"}
        self._state = old | {
            "uri": uri,
            "experiment": config.tracking.experiment,
            "name": _name(stage, self.out, root),
            "fingerprint": fingerprint,
            "status": "RUNNING",
            "told": None,  # the status that the store knows
            "config": _portable(values, root),
            "tags": {"stage": stage, "fingerprint": fingerprint, **_versions()},
            "inputs": inputs,
            "datasets": _datasets(Path(data), stage) if data else [],
        }

    def __enter__(self) -> "Tracker":
        self._shown = len(read(self.folder))
        _save(self.folder, self._state)
        self._bar.start()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "mvhpc.runs.mlflow_sync", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._bar.join()
        if kind is None:
            # inpainting with several samples writes NAME_1, NAME_2, ... and nothing called NAME
            made = {"output": identity(self.out)} if self.out.exists() else {}
            ending: dict[str, Any] = {"status": "FINISHED", "made": made, "datasets": _datasets(self.out, "output")}
        else:
            failed = issubclass(kind, Exception) and not issubclass(kind, Interrupted)
            ending = {"status": "FAILED" if failed else "KILLED", "made": {"error": kind.__name__}}
        try:
            self._process.communicate(json.dumps(ending) + "\n", timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            _warn(self.folder, f"no answer within {GRACE_S:.0f} s")
        if _state(self.folder)["status"] == "RUNNING":  # it did not live to take the ending
            _save(self.folder, _ended(_state(self.folder), ending))

    def _draw(self) -> None:
        """Follow the journal with a progress bar, from the first event of this start on."""
        bar: Progress | None = None
        for number, event in enumerate(follow(self.folder, self._stop)):
            if number < self._shown:
                continue
            if event["event"] == "start":
                bar = Progress(self.stage, event["total"], "step", initial=event["step"])
            elif event["event"] == "warning":
                print(f"step {event['step']}: {event['text']}", file=sys.stderr)
            elif bar is not None and event["event"] in {"metrics", "end"}:
                bar.update(max(0, event["step"] - bar.done), _note(event.get("metrics", {})))
        if bar is not None:
            bar.close()


def _note(metrics: dict[str, float]) -> str | None:
    """What the progress bar says of an interval of training; None for other metrics."""
    if "train/loss" not in metrics and "system/samples_per_second" not in metrics:
        return None
    return ", ".join(text.format(metrics[name]) for name, text in NOTE.items() if name in metrics)


def sync(folder: Path, uri: str = "") -> None:
    """Bring a run folder's MLflow run up to date with its journal; what the store has already is not sent again.

    Args:
        folder: a run folder with a ``tracking.json``.
        uri: of another store than the run's own; what that one knows is noted in a file of its own.

    Raises:
        FileNotFoundError: there is no ``tracking.json``.
        Exception: whatever MLflow raises where the store does not answer; nothing is lost, call it again later.
    """
    state, name = _state(folder), STATE
    if uri and (uri := _store(uri, folder)[0]) != state["uri"]:
        name = f"tracking.{hashlib.sha256(uri.encode()).hexdigest()[:8]}.json"
        known = _state(folder, name) if (folder / name).is_file() else {}
        if known.get("id") != state["id"]:
            known = {"sent": 0, "described": False, "told": None}
        state = {k: v for k, v in state.items() if k not in KNOWN} | {k: known[k] for k in KNOWN if k in known}
        state["uri"] = uri
    client = store_client(_uri(state["uri"], folder))
    if "run" not in state:
        state |= open_run(client, _uri(state["uri"], folder), state)
        _save(folder, state, name)
    if not state["described"]:
        describe(client, state)
        state["described"] = True
        _save(folder, state, name)
    events = list(unseen(map(as_metrics, read(folder)[state["begin"] :])))
    send(client, state["run"], folder, events[state["sent"] :])
    state["sent"] = len(events)
    _save(folder, state, name)
    if state["told"] != state["status"]:
        tell(client, state)
        state["told"] = state["status"]
        _save(folder, state, name)


def catch_up(root: Path) -> None:
    """Sync the run folders up to two levels below ``root`` that ended while their store did not answer.

    Raises:
        Exception: as :func:`sync`.
    """
    for path in [*root.glob(f"*/{STATE}"), *root.glob(f"*/*/{STATE}")]:
        state = _state(path.parent)
        if state["status"] not in {"RUNNING", state["told"]}:
            sync(path.parent)


# --- what is told ------------------------------------------------------------------------------------------------


def _state(folder: Path, name: str = STATE) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _save(folder: Path, state: dict[str, Any], name: str = STATE) -> None:
    write_text(folder / name, json.dumps(state, indent=1))


def _now() -> int:
    return int(1000 * time.time())  # milliseconds, MLflow's unit


def _ended(state: dict[str, Any], ending: dict[str, Any]) -> dict[str, Any]:
    return state | ending | {"end": _now(), "datasets": state["datasets"] + ending.get("datasets", [])}


def _store(uri: str, folder: Path) -> tuple[str, Path]:
    """The store as ``tracking.json`` names it, a database by its way from the run folder so that both can be moved
    together; and the folder that paths are told relative to."""
    if uri and not uri.startswith(SQLITE):
        return uri, folder.resolve().parent
    database = Path(uri.removeprefix(SQLITE)).resolve() if uri else folder.resolve().parent / "mlflow.db"
    return SQLITE + os.path.relpath(database, folder.resolve()), database.parent


def _uri(uri: str, folder: Path) -> str:
    """The inverse of :func:`_store`: an absolute path again."""
    return SQLITE + os.path.normpath(folder.resolve() / uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else uri


def _name(stage: str, out: Path, root: Path) -> str:
    """``vae`` for a result of that name, else the stage and its result: ``predict: predictions/age-given-image``."""
    path = out.resolve().with_suffix("")
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return stage if name == stage else f"{stage}: {name}"


def _portable(value: Any, root: Path) -> Any:
    """``value`` with absolute paths, which name machines and people, cut to the part below ``root`` or the last one."""
    if isinstance(value, dict):
        return {k: _portable(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v, root) for v in value]
    if isinstance(value, str) and Path(value).is_absolute():
        path = Path(value)
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return value


def _versions() -> dict[str, str]:
    """Versions of the packages that decide a result, and of this code where it runs from a clone."""
    tags = {"version.python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    clone = Path(__file__).resolve().parent.parent
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


# --- the process beside the stage --------------------------------------------------------------------------------


def _warn(folder: Path, reason: str) -> None:
    print(f"MLflow: {reason}. The run goes on; {folder} keeps what is missing for the next start.", file=sys.stderr)


def _beside(folder: Path) -> None:
    """Replay the journal until the stage says on standard input how it ended, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the stage, whose end ends this
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)  # the store and its figures are their owner's
    logging.basicConfig(filename=folder / "log.txt", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    endings: list[str] = []
    over = threading.Event()

    def listen() -> None:
        endings.append(sys.stdin.readline())
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    pause, last, warned = 0.0, False, False
    while not last:
        last = over.wait(pause)
        if last:
            ending = json.loads(endings[0]) if endings[0] else {"status": "KILLED", "made": {"error": "killed"}}
            _save(folder, _ended(_state(folder), ending))
        start = time.monotonic()
        try:
            sync(folder)
            if not pause:
                catch_up(folder.parent)
        except Exception as error:
            logging.getLogger(__name__).exception("MLflow")
            if not warned:
                _warn(folder, f"the store cannot be used now ({type(error).__name__})")
            warned = True
        pause = max(PERIOD_S, 20 * (time.monotonic() - start))  # at most a twentieth of one core


if __name__ == "__main__":
    _beside(Path(sys.argv[1]))
