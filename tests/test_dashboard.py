"""The dashboard: behind a password, on loopback alone, and waited for until it answers in HTTP."""

import base64
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest

from mvhpc.config import ConfigError
from mvhpc.runs.dashboard import HOST, _free, dashboard, serve, wait_for_server
from mvhpc.runs.journal import Journal
from mvhpc.runs.mlflow_app import FIRST_VISIT
from mvhpc.runs.mlflow_store import store_client
from mvhpc.runs.mlflow_sync import sync, synced, write_state
from tests.test_mlflow import PNG, losses, track


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_a_server_is_waited_for_until_it_answers_in_http(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not HTTP, nothing at all, and an error are no answer; a probe can never connect to itself, and asks no proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    answers = [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"HTTP/1.1 503 Not yet\r\nContent-Length: 0\r\n\r\n"]
    answers += [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
    peers = []

    def serve_all(server: socket.socket) -> None:
        for answer in answers:
            connection, peer = server.accept()
            with connection:
                peers.append(peer[0])
                connection.recv(1024)
                connection.sendall(answer)

    with socket.create_server((HOST, 0)) as server:
        url = f"http://{HOST}:{server.getsockname()[1]}/health"
        thread = threading.Thread(target=serve_all, args=(server,))
        thread.start()
        assert wait_for_server(url, thread.is_alive, 60)
        thread.join(10)
    assert len(peers) == len(answers) and HOST not in peers
    assert not wait_for_server(url, lambda: True, 1)
    assert not wait_for_server(url, lambda: False, 3600)


def get(url: str, login: str = "") -> tuple[int, str]:
    """Status and text of a GET, with ``user:password`` where given."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.mark.slow
def test_dashboard_needs_its_password_and_takes_what_was_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, runs = tmp_path / "store", tmp_path / "runs"
    (store / ".dashboard").mkdir(parents=True)
    (store / ".dashboard" / "password").touch()  # a process was killed before it wrote the password
    runs.mkdir()
    store_client(f"sqlite:///{store / 'mlflow.db'}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"  # where nothing listens yet
    with track(runs, uri=address):
        losses(runs, range(3))
        (runs / "packed.run" / "x.png").write_bytes(PNG)
        Journal(runs / "packed.run").write("artifact", step=0, path="x.png")

    command = [sys.executable, "-m", "mvhpc", "dashboard", str(store), "--port", str(port)]
    (tmp_path / "logging.py").write_text("raise SystemExit('a script of the user, no module of Python')")
    command.insert(1, "-P")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().split()
        password = line[-1]
        assert line[0].startswith(f"{address}/#/experiments/")
        assert line[1:] == ["user:", "admin", "password:", password]
        for path in ("/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/get-artifact?path=x&run_uuid=y"):
            assert get(address + path) == get(address + path, "admin:guess") == (401, "")
        status, page = get(address, f"admin:{password}")
        assert status == 200 and page.index(FIRST_VISIT) < page.index("<script defer")
        secret = store / ".dashboard" / "password"
        assert (secret.read_text(), secret.stat().st_mode & 0o777) == (password, 0o600)
        with pytest.raises(OSError):  # bound to that one address, not to all of the machine's
            socket.create_connection(("127.0.0.2", port), timeout=2)
        again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith(f"mvhpc: port {port} is taken")

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        sync(runs / "packed.run")
        client = store_client(address)
        run = synced(runs / "packed.run")["run_id"]
        assert [m.step for m in client.get_metric_history(run, "loss/total")] == [0, 1, 2]
        assert [p.read_bytes() for p in (store / "mlartifacts").rglob("x.png")] == [PNG]
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_a_number_that_is_no_port_is_refused_and_0_is_any_free_one() -> None:
    for port in (-1, 70000):
        with pytest.raises(ConfigError, match=f"port {port} is taken or not allowed"):
            _free(port)
    assert _free(0) > 0


def test_the_choices_of_the_first_visit_are_those_that_mlflow_reads() -> None:
    """The page keeps them under the names and the version that MLflow's own code has."""
    scripts = Path(mlflow.__path__[0], "server", "js", "build", "static", "js").glob("main*.js")
    code = "".join(path.read_text() for path in scripts)
    for key in re.findall(r'"(mlflow\.[\w.]+)_v1"', FIRST_VISIT):
        assert re.search(rf'key:\s*"{re.escape(key)}",\s*version:\s*1\b', code), key
    assert '"machine_learning"' in code


def test_a_port_that_is_named_is_taken_or_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, 0)) as first:
        port = first.getsockname()[1]
        refused = pytest.raises(ConfigError, match=f"port {port} is taken or not allowed; choose another")
        with refused, serve(tmp_path / "mlflow.db", port):
            pass
        assert not any(tmp_path.iterdir())
        monkeypatch.setattr("mvhpc.runs.dashboard.FIRST", port)
        assert port < _free(None) < port + 100  # without a name the next free one


def test_dashboard_of_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no MLflow store .*mlflow\.db"):
        dashboard(str(tmp_path))


def test_dashboard_of_predictions_is_that_of_their_store(tmp_path: Path) -> None:
    """Predictions of a model are in the model's store."""
    for name in ("a", "b.run"):
        (tmp_path / "out" / name).mkdir(parents=True)
        write_state(tmp_path / "out" / name, {"store": "sqlite:///../../models/mlflow.db"})
    with pytest.raises(ConfigError, match=rf"no MLflow store {tmp_path}/models/mlflow\.db"):
        dashboard(str(tmp_path / "out"))
    write_state(tmp_path / "out" / "a", {"store": "http://there"})
    with pytest.raises(
        ConfigError, match=r"in several stores; name one of http://there, sqlite:///.*/models/mlflow\.db"
    ):
        dashboard(str(tmp_path / "out"))
    write_state(tmp_path / "out" / "b.run", {"store": "http://there"})
    dashboard(str(tmp_path / "out"))  # a server of its own is only printed
