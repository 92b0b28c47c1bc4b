"""Bring MLflow stores up to date with the journals of run folders.

``tracking.json`` in a run folder describes the MLflow run of the stage: its store, name, configuration, inputs and
status. ``tracking.STORE.json`` beside it notes how much of it and of the journal one store has. What could not be
sent stays in the run folder for the next :func:`sync`: at the end of the stage, at its next start, or whenever it is
called.

Sending is repeatable. The run is found again by an identity chosen here; a lock in the run folder keeps two processes
from creating it at the same time. A metric carries the journal's time, and MLflow keeps an equal point once. Where a
resumed run repeats steps, the first pass counts.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvhpc.config import ConfigError
from mvhpc.runs.journal import read, unseen
from mvhpc.runs.mlflow_names import translate
from mvhpc.runs.mlflow_store import (
    SQLITE,
    describe,
    explain,
    log_model,
    open_run,
    remove_run,
    send_events,
    send_status,
    store_client,
    unreachable,
)
from shards.files import lock_file, write_text

STATE = "tracking.json"
REFUSED = "REFUSED"  # status of a stage that did not begin, since its query or input was refused: no run of MLflow
LOCK = ".tracking.lock"
PATIENCE_S = 60.0  # for another process that brings the same run up to date


def read_state(folder: Path) -> dict[str, Any]:
    """What ``tracking.json`` says; empty where there is none."""
    return _read(folder / STATE)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``tracking.json``."""
    _write(folder / STATE, state)


def synced(folder: Path, store: str = "") -> dict[str, Any]:
    """How much a store has of a run.

    Args:
        folder: the run folder.
        store: as :func:`relative_store` names it; empty: the run's own.

    Returns:
        ``experiment_id``, ``run_id``, ``described``, ``events_sent``, and the ``attempt`` and ``status`` that the store
        knows; empty before the first sync.
    """
    state = read_state(folder)
    found = _read(_synced_file(folder, store or state["store"]))
    return found if found.get("identity") == state["identity"] else {}


def sync(folder: Path, uri: str = "", patience: float = PATIENCE_S) -> None:
    """Bring the MLflow run of a run folder up to date with its journal; what the store has is not sent again.

    Args:
        folder: a run folder with a ``tracking.json``.
        uri: of another store than the run's own.
        patience: seconds to wait for another process that does the same.

    Raises:
        ConfigError: there is no ``tracking.json``.
        BlockingIOError: another process has been doing this for longer.
        Exception: whatever MLflow raises where the store does not answer; nothing is lost, call it again later.
    """
    if not (folder / STATE).is_file():
        raise ConfigError(f"{folder}: no run folder (it has no {STATE})")
    with lock_file(folder / LOCK, patience, required=False):
        state = read_state(folder)
        store = relative_store(uri, folder) if uri else state["store"]
        try:
            _send(folder, state, store)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST" or not synced(folder, store):
                raise
            _synced_file(folder, store).unlink()  # the store was deleted or replaced: send everything to the new one
            _send(folder, state, store)


def catch_up(root: Path, over: Callable[[], bool] = lambda: False) -> dict[Path, str]:
    """Sync the run folders up to two levels below ``root`` that ended while their store did not answer.

    A run that its store refuses does not keep the others from theirs; a store that cannot be reached is tried once.

    Args:
        root: folder of run folders.
        over: asked before each run; nothing more is sent once it says so.

    Returns:
        Run folder -> why its store still lacks something, in words.
    """
    reasons: dict[Path, str] = {}
    silent: dict[str, str] = {}  # tracking URI of a store that could not be reached -> reason
    for folder in _run_folders(root):
        if over():
            break
        try:
            state = read_state(folder)
            if state["status"] == "RUNNING" or _knows_status(synced(folder), state):
                continue
            uri = absolute_store(state["store"], folder)
        except (OSError, ValueError, KeyError):
            reasons[folder] = f"{STATE} or the note beside it is damaged"
            continue
        try:
            if uri not in silent:
                sync(folder, patience=0)
        except BlockingIOError:  # another process is at it
            continue
        except Exception as error:
            logging.getLogger(__name__).exception("MLflow: %s", folder)
            reasons[folder] = explain(error)
            if unreachable(error):
                silent[uri] = reasons[folder]
        if uri in silent:
            reasons[folder] = silent[uri]
    return reasons


def stores_below(root: Path) -> list[str]:
    """Tracking URIs of the stores that the runs up to two levels below a folder are in."""
    found = set()
    for folder in _run_folders(root):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged
            found.add(absolute_store(read_state(folder)["store"], folder))
    return sorted(found)


def _run_folders(root: Path) -> list[Path]:
    """Those up to two levels below a folder."""
    return [path.parent for path in sorted([*root.glob(f"*/{STATE}"), *root.glob(f"*/*/{STATE}")])]


def record_end(folder: Path, attempt: str, ending: dict[str, Any]) -> None:
    """Write into ``tracking.json`` how a stage ended.

    Args:
        folder: the run folder.
        attempt: which start of the stage ended; where it was started again meanwhile, nothing is written.
        ending: ``status`` (of MLflow, or :data:`REFUSED`), ``outcome`` (tags), ``datasets`` that the stage wrote, and
            ``model``, see :func:`mvhpc.runs.mlflow_store.log_model`.
    """
    state = read_state(folder)
    if state["attempt"] == attempt:
        datasets = state["datasets"] + ending.get("datasets", [])
        write_state(folder, state | ending | {"end_time": int(1000 * time.time()), "datasets": datasets})


def record_kill(folder: Path, attempt: str) -> None:
    """Write into ``tracking.json`` that a stage was killed, and with it the pipeline that had started it."""
    killed = {"status": "KILLED", "outcome": {"error": "killed"}}
    parent = read_state(folder).get("parent")
    record_end(folder, attempt, killed)
    if parent:
        above = folder / parent["folder"]
        if read_state(above).get("status") == "RUNNING":
            record_end(above, parent["attempt"], killed)


def relative_store(uri: str, folder: Path) -> str:
    """A tracking URI as ``tracking.json`` holds it.

    A database is named relative to the run folder, so that both can be moved together. An empty ``uri`` means
    ``mlflow.db`` beside the run folder.
    """
    if uri and not uri.startswith(SQLITE):
        return uri
    database = Path(uri.removeprefix(SQLITE)).resolve() if uri else folder.resolve().parent / "mlflow.db"
    return SQLITE + os.path.relpath(database, folder.resolve())


def absolute_store(store: str, folder: Path) -> str:
    """The inverse of :func:`relative_store`."""
    if not store.startswith(SQLITE):
        return store
    return SQLITE + os.path.normpath(folder.resolve() / store.removeprefix(SQLITE))


def _send(folder: Path, state: dict[str, Any], store: str) -> None:
    uri, note = absolute_store(store, folder), _synced_file(folder, store)
    done = synced(folder, store)
    if state["status"] == REFUSED:
        if done:
            remove_run(store_client(uri), done["run_id"])
            note.unlink()
        return
    parent = _send_parent(folder, state, uri)
    client = store_client(uri)
    if not done:
        done = {"identity": state["identity"], "described": False, "events_sent": 0, "attempt": "", "status": ""}
        done |= open_run(client, uri, state, parent)
        _write(note, done)
    run = done["run_id"]
    client.get_run(run)  # raises where the store does not have it any more
    if not done["described"]:
        describe(client, run, done["experiment_id"], state)
        done["described"] = True
        _write(note, done)
    events = list(unseen(translate(read(folder)[state["first_event"] :])))
    if len(events) > done["events_sent"]:
        send_events(client, run, folder, events[done["events_sent"] :])
        done["events_sent"] = len(events)
        _write(note, done)
    if not _knows_status(done, state):
        if state.get("model") and state["status"] == "FINISHED":
            log_model(client, run, done["experiment_id"], folder, state["model"])
        send_status(client, run, state)
        done |= {"attempt": state["attempt"], "status": state["status"]}
        _write(note, done)


def _send_parent(folder: Path, state: dict[str, Any], uri: str) -> str:
    """Bring the run of the pipeline that a stage belongs to up to date; return its identity there, or nothing."""
    if not state.get("parent"):
        return ""
    parent = Path(os.path.normpath(folder.resolve() / state["parent"]["folder"]))
    if not (parent / STATE).is_file():  # moved or removed
        return ""
    store = relative_store(uri, parent)
    found, known = read_state(parent), synced(parent, store)
    if not known or not _knows_status(known, found):
        sync(parent, uri)
    run: str = synced(parent, store).get("run_id", "")
    return run


def _knows_status(done: dict[str, Any], state: dict[str, Any]) -> bool:
    if state["status"] == REFUSED:
        return not done
    return (done.get("attempt"), done.get("status")) == (state["attempt"], state["status"])


def _synced_file(folder: Path, store: str) -> Path:
    return folder / f"tracking.{hashlib.sha256(store.encode()).hexdigest()[:8]}.json"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))
