"""Laws of tracking: every point of the journal reaches MLflow once, whatever dies, and nothing that dies is felt."""

import base64
import getpass
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mvhpc.cli import main
from mvhpc.config import ConfigError, fingerprint, load_config
from mvhpc.data_stages import PackConfig
from mvhpc.runs import mlflow_sync
from mvhpc.runs.dashboard import dashboard
from mvhpc.runs.journal import Journal
from mvhpc.runs.mlflow_sync import Tracker, catch_up, sync

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


def tracker(root: Path, uri: str = "", seed: int = 0) -> Tracker:
    """A tracker around the stage `pack` in ``root``, whose result is there already."""
    (root / "packed").mkdir(exist_ok=True)
    (root / "packed.run").mkdir(exist_ok=True)
    overrides = [f"source={root}/scans", f"out={root}/packed", f"seed={seed}", f"tracking.uri={uri}"]
    overrides += ["tracking.experiment=laws"]
    config = load_config(PackConfig, "pack", "default", overrides)
    inputs = {"source": "abc123"}
    return Tracker("pack", config, root / "packed.run", fingerprint=fingerprint(seed), inputs=inputs)


def losses(root: Path, steps: range, shift: float = 0.0) -> None:
    """Journal a loss and a learning rate at each of ``steps``."""
    journal = Journal(root / "packed.run")
    journal.write("start", step=steps.start, total=steps.stop)
    for step in steps:
        journal.write("metrics", step=step, metrics={"train/loss": 1 / (step + 1) + shift, "train/lr": 1e-3})


def history(root: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """What the store beside the run folder has of a metric."""
    state = json.loads((root / "packed.run" / "tracking.json").read_text())
    client = mlflow_sync.store_client(f"sqlite:///{root / 'mlflow.db'}")
    return [(m.step, m.value) for m in client.get_metric_history(state["run"], name)]


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
def test_every_point_once_over_failure_resume_and_lost_notes(tmp_path: Path) -> None:
    journal, state_file = Journal(tmp_path / "packed.run"), tmp_path / "packed.run" / "tracking.json"
    with pytest.raises(ZeroDivisionError), tracker(tmp_path):
        losses(tmp_path, range(3))
        raise ZeroDivisionError
    client = mlflow_sync.store_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = json.loads(state_file.read_text())
    run = client.get_run(first["run"])
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "ZeroDivisionError")
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]

    with tracker(tmp_path):  # goes on from a checkpoint of step 1: steps 1 and 2 stand in the journal twice
        losses(tmp_path, range(1, 5), shift=100.0)
        figure = tmp_path / "packed.run" / "figures" / "x.png"
        figure.parent.mkdir()
        figure.write_bytes(PNG)
        journal.write("artifact", step=4, path="figures/x.png")
        journal.write("metrics", step=4, metrics={"validation/loss of état?": float("nan")})
        journal.write("summary", metrics={"subjects": 6, "note": "words are no metric"})
    expected = [(s, 1 / (s + 1) + (100 if s > 2 else 0)) for s in range(5)]
    assert history(tmp_path) == expected
    last = json.loads(state_file.read_text())
    assert last["run"] == first["run"]

    # A note lost between sending and writing it down: everything is sent again, and found to be there.
    for lost in ({"sent": 0, "described": False}, {"run": None}):
        state_file.write_text(json.dumps({k: v for k, v in (last | lost).items() if v is not None}))
        sync(tmp_path / "packed.run")
        assert history(tmp_path) == expected
    assert len(client.search_runs([run.info.experiment_id])) == 1

    run = client.get_run(first["run"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "pack: packed"
    assert run.data.metrics["summary/subjects"] == 6
    assert run.data.params["spacing"] == "2.0"
    assert run.data.tags["input.source"] == "abc123"
    assert run.data.tags["output"] == mlflow_sync.identity(tmp_path / "packed")
    assert {"version.torch", "version.python", "fingerprint", "stage"} <= run.data.tags.keys()
    assert [a.path for a in client.list_artifacts(first["run"])] == ["config.yaml", "figures"]
    assert Path(client.download_artifacts(first["run"], "figures/x.png")).read_bytes() == PNG
    assert "validation/loss of état_" in run.data.metrics

    told = json.dumps([run.data.params, run.data.tags, run.info.run_name, run.info.user_id])
    told += Path(client.download_artifacts(first["run"], "config.yaml")).read_text()
    for private in (str(tmp_path), "secret", str(Path.home()), socket.gethostname()):
        assert private not in told
    assert getpass.getuser() not in (run.info.user_id, *run.data.tags.values())

    with tracker(tmp_path, seed=1):  # another configuration in the same folder is another run, with its points alone
        losses(tmp_path, range(2))
    assert json.loads(state_file.read_text())["run"] != first["run"]
    assert [step for step, _ in history(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_dead_server_costs_seconds_and_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with tracker(tmp_path, uri="http://127.0.0.1:9"):
        assert time.monotonic() - start < 2  # nothing is waited for before the stage begins
        losses(tmp_path, range(3))
        time.sleep(4)
    assert time.monotonic() - start < 25
    assert capfd.readouterr().err.count("MLflow: ") == 1

    with tracker(tmp_path):  # the same result into a store that works: from the first point on
        pass
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]


def serve(store: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server on this machine's loopback, answering."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{store / 'mlflow.db'}",
        "--artifacts-destination",
        str(store / "files"),
    ]
    with (store / "server.log").open("ab") as log:
        server = subprocess.Popen(command, cwd=store, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        try:
            return get(f"http://127.0.0.1:{port}/health") == 200
        except OSError:
            assert server.poll() is None, (store / "server.log").read_text()
            return False

    try:
        wait_for(answers, 240)  # its imports alone take long on a busy machine
    except AssertionError:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        raise
    return server


@pytest.mark.slow
def test_server_killed_and_started_again_and_a_second_store_have_every_point_once(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "packed.run"
    store.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    client = mlflow_sync.store_client(uri)

    def steps() -> list[int]:
        run = json.loads((folder / "tracking.json").read_text()).get("run")
        return [m.step for m in client.get_metric_history(run, "train/loss")] if run else []

    server = serve(store, port)
    try:
        with tracker(tmp_path, uri=uri):
            losses(tmp_path, range(3))
            wait_for(lambda: steps() == [0, 1, 2], 60)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            losses(tmp_path, range(3, 6))
            time.sleep(2 * mlflow_sync.PERIOD_S)
            server = serve(store, port)
            losses(tmp_path, range(6, 9))
        sync(folder)
        assert steps() == list(range(9))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    other = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = (folder / "tracking.json").read_text()
    assert main(["mlflow-sync", str(folder), "--uri", other]) == 0
    Journal(folder).write("metrics", step=9, metrics={"train/loss": 0.1})
    for note in tmp_path.glob("packed.run/tracking.*.json"):
        note.unlink()  # what the second store knows is forgotten: all is sent again, and found to be there
    assert main(["mlflow-sync", str(folder), "--uri", other]) == main(["mlflow-sync", str(folder), "--uri", other]) == 0
    assert (folder / "tracking.json").read_text() == before
    second = mlflow_sync.store_client(other)
    (run,) = second.search_runs([second.get_experiment_by_name("laws").experiment_id])
    assert [m.step for m in second.get_metric_history(run.info.run_id, "train/loss")] == list(range(10))
    assert run.info.status == "FINISHED"
    assert main(["mlflow-sync", str(store)]) == 2


@pytest.mark.slow
def test_locked_store_is_filled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path):
        losses(tmp_path, range(1))
    monkeypatch.setattr(mlflow_sync, "GRACE_S", 3.0)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    with tracker(tmp_path):
        losses(tmp_path, range(1, 4))
    assert time.monotonic() - start < 15  # less than the 20 s that sqlite waits for a lock
    assert "keeps what is missing" in capfd.readouterr().err
    other.execute("ROLLBACK")
    other.close()
    catch_up(tmp_path)
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2, 3]
    run = json.loads((tmp_path / "packed.run" / "tracking.json").read_text())["run"]
    assert mlflow_sync.store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run).info.status == "FINISHED"


@pytest.mark.slow
def test_stage_killed_outright_is_recorded_and_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_mlflow as t\n"
        "root = Path(sys.argv[1])\n"
        "with t.tracker(root) as tracker:\n"
        "    t.losses(root, range(2)); print(tracker._process.pid, flush=True); time.sleep(60)\n"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert stage.stdout is not None
    beside = int(stage.stdout.readline())
    time.sleep(1)
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()

    def gone() -> bool:
        path = Path(f"/proc/{beside}/stat")
        return not path.exists() or path.read_text().split()[2] == "Z"

    wait_for(gone)
    assert [step for step, _ in history(tmp_path)] == [0, 1]
    run = json.loads((tmp_path / "packed.run" / "tracking.json").read_text())["run"]
    assert mlflow_sync.store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run).info.status == "KILLED"


def get(url: str, login: str = "") -> int:
    """The status of a GET, with ``user:password`` where given."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_dashboard_needs_its_password_and_takes_what_was_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, runs = tmp_path / "store", tmp_path / "runs"
    store.mkdir()
    runs.mkdir()
    mlflow_sync.store_client(f"sqlite:///{store / 'mlflow.db'}").search_experiments()
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port + 1}"  # the next free port, where nothing listens yet
    with tracker(runs, uri=address):
        losses(runs, range(3))
        (runs / "packed.run" / "x.png").write_bytes(PNG)
        Journal(runs / "packed.run").write("artifact", step=0, path="x.png")

    command = [sys.executable, "-m", "mvhpc", "dashboard", str(store), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline().split()
        password = said[-1]
        assert said[0].startswith(f"{address}/#/experiments/")
        assert said[1:] == ["user:", "admin", "password:", password]
        for path in ("/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/get-artifact?path=x&run_uuid=y"):
            assert get(address + path) == get(address + path, "admin:guess") == 401
        assert get(address, f"admin:{password}") == 200
        secret = store / ".dashboard" / "password"
        assert (secret.read_text(), secret.stat().st_mode & 0o777) == (password, 0o600)
        with pytest.raises(OSError):  # bound to that one address, not to all of the machine's
            socket.create_connection(("127.0.0.2", port + 1), timeout=2)

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        sync(runs / "packed.run")
        client = mlflow_sync.store_client(address)
        run = json.loads((runs / "packed.run" / "tracking.json").read_text())["run"]
        assert [m.step for m in client.get_metric_history(run, "train/loss")] == [0, 1, 2]
        assert [p.read_bytes() for p in (store / "mlartifacts").rglob("x.png")] == [PNG]
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port + 1), timeout=2)
    taken.close()


def test_dashboard_of_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no MLflow store .*mlflow\.db"):
        dashboard(str(tmp_path))
