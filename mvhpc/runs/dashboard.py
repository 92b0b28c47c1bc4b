"""MLflow's web pages over a store of runs: on this machine only, behind a password."""

import contextlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mvhpc.config import ConfigError
from mvhpc.runs.mlflow_store import ENVIRONMENT, SQLITE, save_view, store_client
from mvhpc.runs.mlflow_sync import catch_up, stores_below
from shards.files import write_once, write_text

HOST = "127.0.0.1"
PROBE_HOST = "127.0.0.2"  # where probes come from; see `answers`
USER = "admin"
FIRST, PORTS = 5000, 100  # ports that are tried where none is named
START_S = 120.0


def dashboard(store: str, port: int | None = None) -> None:
    """Serve a store until interrupted; the password is made at the first start and printed then.

    Args:
        store: a folder with ``mlflow.db`` or with runs whose store is elsewhere, an sqlite URI, or the address of a
            server, which is only printed.
        port: where it listens; None: the first free one.

    Raises:
        ConfigError: there is no store, or the runs are in several, or the port is not free.
        RuntimeError: MLflow does not start; with the end of its log.
    """
    store = _store_of(store)
    if store.startswith(("http://", "https://")):
        print(f"The runs are on a server of their own: open {store}")
        return
    database = Path(store.removeprefix(SQLITE))
    if not database.is_file():
        raise ConfigError(f"no MLflow store {database}; name the folder of your runs, or run a stage first")
    for folder, reason in catch_up(database.parent).items():
        print(f"{folder}: its store lacks something still ({reason})", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):  # both raise here, so that the server is ended too
        signal.signal(number, signal.default_int_handler)
    newest, view = _newest(database)
    new = not _read(_private(database) / "password")
    with contextlib.suppress(KeyboardInterrupt), serve(database, port) as (address, password):
        page = f"{address}/#/experiments/{newest}/runs?workflowType=machine_learning&viewStateShareKey={view}"
        shown = password if new else f"the one in {_private(database) / 'password'}"
        print(f"{page}   user: {USER}   password: {shown}\nCtrl-C ends it.", flush=True)
        while True:
            time.sleep(3600)


def _store_of(store: str) -> str:
    """The tracking URI of a folder: of ``mlflow.db`` there, otherwise of the store of its runs, as of predictions."""
    if "://" in store:
        return store
    database = Path(store) / "mlflow.db"
    found = [] if database.is_file() else stores_below(Path(store))
    if len(found) > 1:
        raise ConfigError(f"{store}: its runs are in several stores; name one of {', '.join(found)}")
    return found[0] if found else f"{SQLITE}{database}"


@contextlib.contextmanager
def serve(database: Path, port: int | None) -> Iterator[tuple[str, str]]:
    """Serve an sqlite store on loopback while the block lasts; yield address and password.

    Several servers of a store share its password and users.

    Raises:
        ConfigError: the port is not free, or where none is named, no port.
        RuntimeError: MLflow does not start.
    """
    port = _free(port)
    private = _private(database)
    private.mkdir(mode=0o700, exist_ok=True)
    if not _read(private / "password"):
        (private / "users.db").unlink(missing_ok=True)  # holds the password that was lost
    password, key = _secret(private / "password"), _secret(private / "session-key")
    settings = (
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = {SQLITE}{(private / 'users.db').resolve()}\n"
        f"admin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    if _read(private / "auth.ini") != settings:
        write_text(private / "auth.ini", settings)
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--app-name", "mvhpc"]
    command += ["--backend-store-uri", f"{SQLITE}{database.resolve()}", "--host", HOST, "--port", str(port)]
    command += ["--artifacts-destination", (database.resolve().parent / "mlartifacts").as_uri(), "--workers", "1"]
    environment = os.environ | ENVIRONMENT
    environment |= {
        "PYTHONSAFEPATH": "1",  # of its workers too
        "MLFLOW_AUTH_CONFIG_PATH": str((private / "auth.ini").resolve()),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # background jobs, which are not needed here
    }
    log = private / f"log-{port}.txt"
    with log.open("w") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        # Uvicorn imports from the folder that it runs in, where the user may have a logging.py.
        server = subprocess.Popen(command, env=environment, cwd=private, start_new_session=True, **streams)
    try:
        if not wait_for_server(f"{address}/health", lambda: server.poll() is None):
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise RuntimeError(f"MLflow's server did not start; the end of {log}:\n{tail}")
        yield address, password
    finally:
        _end(server)


def _newest(database: Path) -> tuple[str, str]:
    """The experiment that was written to last, and the key of its view, which is made anew."""
    client = store_client(f"{SQLITE}{database.resolve()}")
    newest = client.search_experiments(max_results=1, order_by=["last_update_time DESC"])[0].experiment_id
    return newest, save_view(client, newest)


def _private(database: Path) -> Path:
    return database.parent / ".dashboard"


def _secret(path: Path) -> str:
    """A random password, made once and readable by its owner alone."""
    write_once(path, secrets.token_urlsafe(18))
    return _read(path)


def _read(path: Path) -> str:
    """The text of a file; empty where there is none."""
    return path.read_text() if path.is_file() else ""


def _free(port: int | None) -> int:
    """``port``, or the first free one where it is None."""
    for candidate in range(FIRST, FIRST + PORTS) if port is None else [port]:
        with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):  # the latter: no port at all
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, candidate))
            found: int = probe.getsockname()[1]  # of 0, any free one
            return found
    if port is not None:
        raise ConfigError(f"port {port} is taken or not allowed; choose another, or leave --port out")
    raise ConfigError(f"no free port from {FIRST} to {FIRST + PORTS - 1}; name another with --port")


def wait_for_server(url: str, alive: Callable[[], bool], patience: float = START_S) -> bool:
    """Wait until a server on this machine answers.

    Args:
        url: a page of it, on a loopback address.
        alive: whether the server's process still runs; where it does not, nothing is waited for.
        patience: seconds.

    Returns:
        Whether it answers.
    """
    end = time.monotonic() + patience
    while alive() and time.monotonic() < end:
        if answers(url):
            return True
        time.sleep(0.3)
    return False


def answers(url: str) -> bool:
    """Whether a GET from a server on this machine succeeds; an answer that is not HTTP is none.

    The request comes from a loopback address of its own. From that of the server, the operating system may choose the
    server's own port for it while nobody listens there: the connection is then to itself, the request returns as the
    answer, and the server cannot bind the port.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or HOST, parts.port, 5.0, (PROBE_HOST, 0))
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which form a process group."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
            return
