"""Laws of tracking: every point of the journal reaches MLflow once, whatever dies; the stage itself notices nothing."""

import getpass
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvhpc.cli import main
from mvhpc.config import ConfigError, Tracking, check_store, fingerprint, load_config
from mvhpc.data_stages import PackConfig
from mvhpc.runs import mlflow_process, mlflow_replayer
from mvhpc.runs.dashboard import HOST, wait_for_server
from mvhpc.runs.folder import identity
from mvhpc.runs.journal import Journal
from mvhpc.runs.mlflow_store import store_client
from mvhpc.runs.mlflow_sync import catch_up, read_state, record_end, sync, synced, write_state
from mvhpc.runs.tracker import Tracker

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def _own_process() -> Iterator[None]:
    """The process beside the stages has this test's standard error."""
    mlflow_replayer.close_idle()
    yield
    mlflow_replayer.close_idle()


def track(root: Path, uri: str = "", seed: int = 0) -> Tracker:
    """A tracker around the stage `pack` in ``root``, whose result is there already."""
    (root / "packed").mkdir(exist_ok=True)
    (root / "packed.run").mkdir(exist_ok=True)
    values = {
        "source": f"{root}/scans",
        "out": f"{root}/packed",
        "seed": seed,
        "tracking.uri": uri,
        "tracking.experiment": "laws",
    }
    config = load_config(PackConfig, "pack", values=values)
    inputs = {"source": "abc123"}
    folder = root / "packed.run"
    return Tracker("pack", config, folder, name="pack", fingerprint=fingerprint(seed), inputs=inputs)


def losses(root: Path, steps: range, shift: float = 0.0) -> None:
    """Journal a loss and a learning rate at each of ``steps``."""
    journal = Journal(root / "packed.run")
    journal.write("start", step=steps.start, total=steps.stop)
    for step in steps:
        journal.write("metrics", step=step, metrics={"train/loss": 1 / (step + 1) + shift, "train/lr": 1e-3})


def history(root: Path, name: str = "loss/total") -> list[tuple[int, float]]:
    """What the store beside the run folder has of a metric."""
    client = store_client(f"sqlite:///{root / 'mlflow.db'}")
    run = synced(root / "packed.run")["run_id"]
    return [(m.step, m.value) for m in client.get_metric_history(run, name)]


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.mark.slow
def test_every_point_once_over_failure_resume_and_lost_notes(tmp_path: Path) -> None:
    folder, journal = tmp_path / "packed.run", Journal(tmp_path / "packed.run")
    with pytest.raises(ZeroDivisionError), track(tmp_path):
        losses(tmp_path, range(3))
        raise ZeroDivisionError
    client = store_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = synced(folder)["run_id"]
    run = client.get_run(first)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "ZeroDivisionError")
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]

    with track(tmp_path):  # goes on from a checkpoint of step 1: steps 1 and 2 stand in the journal twice
        losses(tmp_path, range(1, 5), shift=100.0)
        figure = folder / "figures" / "x.png"
        figure.parent.mkdir()
        figure.write_bytes(PNG)
        journal.write("artifact", step=4, path="figures/x.png")
        journal.write("metrics", step=4, metrics={"validation/loss of état?": float("nan")})
        scores = {"test/age_mae": 7.5, "test/age_mae_low": 6.0, "test/age_mae_high": 9.25}
        journal.write("summary", metrics={"subjects": 6, "note": "text is no metric", **scores})
    expected = [(s, 1 / (s + 1) + (100 if s > 2 else 0)) for s in range(5)]
    assert history(tmp_path) == expected
    assert synced(folder)["run_id"] == first

    # A note lost between sending and writing it down: everything is sent again, and found to be there.
    (note,) = folder.glob("tracking.*.json")
    last = json.loads(note.read_text())
    for lost in (last | {"events_sent": 0, "described": False}, {}):
        note.write_text(json.dumps(lost))
        sync(folder)
        assert history(tmp_path) == expected
    assert len(client.search_runs([run.info.experiment_id])) == 1

    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "pack" and "error" not in run.data.tags
    assert run.data.tags["summary.subjects"] == "6" and run.data.metrics["test/age_mae"] == 7.5
    assert run.data.tags["test/age_mae"] == "7.5 [6, 9.25]" and "test/age_mae_low" not in run.data.metrics
    assert run.data.params["spacing"] == "2.0"
    assert run.data.tags["input.source"] == "abc123"
    assert run.data.tags["output"] == identity(tmp_path / "packed")
    assert {"version.torch", "version.python", "fingerprint", "stage"} <= run.data.tags.keys()
    assert ("mlflow.source.git.commit" in run.data.tags) == (Path(__file__).parents[1] / ".git").exists()
    assert [a.path for a in client.list_artifacts(first)] == ["config.yaml", "figures"]
    assert Path(client.download_artifacts(first, "figures/x.png")).read_bytes() == PNG
    assert "validation/loss of état_" in run.data.metrics

    sent = json.dumps([run.data.params, run.data.tags, run.info.run_name, run.info.user_id])
    sent += Path(client.download_artifacts(first, "config.yaml")).read_text()
    for private in (str(tmp_path), "secret", str(Path.home()), socket.gethostname()):
        assert private not in sent
    assert getpass.getuser() not in (run.info.user_id, *run.data.tags.values())

    with track(tmp_path, seed=1):  # another configuration in the same folder is another run, with its points alone
        losses(tmp_path, range(2))
    assert synced(folder)["run_id"] != first
    assert [step for step, _ in history(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_dead_server_costs_seconds_and_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with track(tmp_path, uri="http://127.0.0.1:9"):
        assert time.monotonic() - start < 2  # nothing is waited for before the stage begins
        losses(tmp_path, range(3))
        time.sleep(4)
    assert time.monotonic() - start < 25
    warning = capfd.readouterr().err
    assert warning.count("MLflow: ") == 1 and "(Connection refused)" in warning

    with track(tmp_path):  # the same result into a store that works: from the first point on
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

    if not wait_for_server(f"http://{HOST}:{port}/health", lambda: server.poll() is None, 240):  # its imports are slow
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        raise AssertionError((store / "server.log").read_text())
    return server


@pytest.mark.slow
def test_server_killed_and_started_again_and_a_second_store_have_every_point_once(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "packed.run"
    store.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    client = store_client(uri)

    def steps() -> list[int]:
        run = synced(folder).get("run_id")
        return [m.step for m in client.get_metric_history(run, "loss/total")] if run else []

    server = serve(store, port)
    try:
        with track(tmp_path, uri=uri):
            losses(tmp_path, range(3))
            wait_for(lambda: steps() == [0, 1, 2], 60)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            losses(tmp_path, range(3, 6))
            time.sleep(2 * mlflow_process.PERIOD_S)
            server = serve(store, port)
            losses(tmp_path, range(6, 9))
        sync(folder)
        assert steps() == list(range(9))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    other = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = {path: path.read_text() for path in folder.glob("tracking*.json")}
    assert main(["mlflow-sync", str(folder), "--uri", other]) == 0
    Journal(folder).write("metrics", step=9, metrics={"train/loss": 0.1})
    for note in {*folder.glob("tracking*.json")} - before.keys():
        note.unlink()  # what the second store knows is forgotten: all is sent again, and found to be there
    assert main(["mlflow-sync", str(folder), "--uri", other]) == main(["mlflow-sync", str(folder), "--uri", other]) == 0
    assert {path: path.read_text() for path in before} == before
    second = store_client(other)
    (run,) = second.search_runs([second.get_experiment_by_name("laws").experiment_id])
    assert [m.step for m in second.get_metric_history(run.info.run_id, "loss/total")] == list(range(10))
    assert run.info.status == "FINISHED"
    assert main(["mlflow-sync", str(store)]) == 2


@pytest.mark.slow
def test_locked_store_is_filled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with track(tmp_path):
        losses(tmp_path, range(1))
    monkeypatch.setattr(mlflow_replayer, "GRACE_S", 3.0)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    with track(tmp_path):
        losses(tmp_path, range(1, 4))
    assert time.monotonic() - start < 15  # less than the 20 s that sqlite waits for a lock
    assert "keeps what is missing" in capfd.readouterr().err
    other.execute("ROLLBACK")
    other.close()
    catch_up(tmp_path)
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2, 3]
    run = synced(tmp_path / "packed.run")["run_id"]
    assert store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run).info.status == "FINISHED"


@pytest.mark.slow
def test_every_name_of_a_column_is_sent(tmp_path: Path) -> None:
    """Columns of tables have characters that MLflow refuses in a parameter's name."""
    state, names = track(tmp_path).state, ("Age (years)", "kg//m²", "BMI/", "Age [years]", "sex")
    config = state["config"] | {"rename": dict.fromkeys(names, "age")}
    write_state(tmp_path / "packed.run", state | {"config": config, "status": "FINISHED", "outcome": {}, "end_time": 1})
    sync(tmp_path / "packed.run")
    run = store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(synced(tmp_path / "packed.run")["run_id"])
    found = {name.removeprefix("rename.") for name in run.data.params if name.startswith("rename.")}
    assert found == {"Age _years_", "kg/m²", "BMI", "sex"} and run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_refused_run_leaves_its_neighbours_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "healthy" / "packed.run").mkdir(parents=True)
    for name, store in (("a", "file:./mlruns"), ("b", "sqlite:///../text.db"), ("c", "sqlite:///../mlflow.db")):
        folder = tmp_path / "healthy" / f"{name}.run"
        folder.mkdir()
        state = {"identity": name, "first_event": 0, "start_time": 1, "end_time": 2, "attempt": "1", "inputs": {}}
        state |= {"status": "FINISHED", "store": store, "experiment": "laws", "run_name": name, "config": {"seed": 0}}
        write_state(folder, state | {"tags": {"stage": "x"}, "datasets": [], "outcome": {"output": "0"}})
    (tmp_path / "healthy" / "d.run").mkdir()
    (tmp_path / "healthy" / "d.run" / "tracking.json").write_text("{")
    (tmp_path / "healthy" / "text.db").write_text("no database " * 100)
    with track(tmp_path / "healthy"):
        losses(tmp_path / "healthy", range(3))
        wait_for(lambda: synced(tmp_path / "healthy" / "c.run").get("status") == "FINISHED")
    assert "MLflow" not in capfd.readouterr().err  # all of this run is stored
    reasons = {folder.name: reason for folder, reason in catch_up(tmp_path / "healthy").items()}
    assert reasons.keys() == {"a.run", "b.run", "d.run"}
    assert "filesystem tracking backend" in reasons["a.run"] and "not a database" in reasons["b.run"]


@pytest.mark.parametrize("uri", ["file:./mlruns", "./mlruns", "/data/mlruns", "ftp://server/x"])
def test_a_uri_that_is_no_store_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use sqlite:///FOLDER/mlflow\.db or the http address of a server"):
        track(tmp_path, uri=uri)


@pytest.mark.parametrize(
    "uri", ["", "databricks", "sqlite:///x.db", "https://server:5000", "postgresql+psycopg2://user@host/runs"]
)
def test_databases_and_servers_are_stores(uri: str) -> None:
    check_store(uri)
    assert Tracking(uri=uri, experiment="laws").uri == uri


@pytest.mark.slow
def test_stage_killed_outright_is_recorded_and_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_mlflow as t\n"
        "root = Path(sys.argv[1])\n"
        "with t.track(root) as tracker:\n"
        "    t.losses(root, range(2)); print(tracker.replayer.process.pid, flush=True); time.sleep(60)\n"
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

    wait_for(gone, 240)  # creating the store's tables alone takes long on a busy machine
    assert [step for step, _ in history(tmp_path)] == [0, 1]
    run = synced(tmp_path / "packed.run")["run_id"]
    assert store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run).info.status == "KILLED"


SYNC = """
import sys
from pathlib import Path
from mvhpc.runs.mlflow_store import store_client
from mvhpc.runs.mlflow_sync import sync
store_client(sys.argv[1])
print(flush=True)
sys.stdin.readline()
for folder in sys.argv[2:]:
    sync(Path(folder))
"""


@pytest.mark.slow
def test_two_processes_that_sync_one_run_create_it_once(tmp_path: Path) -> None:
    """Nor do they fail where neither finds the store's tables or the experiment."""
    store, folders = f"sqlite:///{tmp_path / 'mlflow.db'}", []
    for number in range(8):
        root = tmp_path / str(number)
        root.mkdir()
        folders.append(root / "packed.run")
        write_state(folders[-1], track(root, uri=store).state)
        losses(root, range(3))  # of this run: what was there before is of an earlier one
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SYNC, store, *map(str, folders)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:  # both are connected before either begins
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait(120) for process in processes] == [0, 0]
    client = store_client(store)
    runs = client.search_runs([client.get_experiment_by_name("laws").experiment_id])
    assert sorted(run.data.tags["identity"] for run in runs) == sorted(read_state(f)["identity"] for f in folders)
    for folder in folders:
        points = client.get_metric_history(synced(folder)["run_id"], "loss/total")
        assert [point.step for point in points] == [0, 1, 2]


@pytest.mark.slow
def test_a_store_that_was_deleted_is_filled_again(tmp_path: Path) -> None:
    with track(tmp_path):
        losses(tmp_path, range(3))
    (tmp_path / "mlflow.db").unlink()
    command = [sys.executable, "-m", "mvhpc", "mlflow-sync", str(tmp_path / "packed.run")]
    assert subprocess.run(command, check=False).returncode == 0
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]


@pytest.mark.slow
def test_an_interrupted_stage_does_not_wait_for_mlflow(tmp_path: Path) -> None:
    """It is recorded by the process that stays behind; importing MLflow alone takes seconds."""
    with pytest.raises(KeyboardInterrupt), track(tmp_path) as tracker:
        losses(tmp_path, range(3))
        raise KeyboardInterrupt
    process = tracker.replayer.process
    process.stdout.close()  # as if the program was over
    assert process.poll() is None and read_state(tmp_path / "packed.run")["status"] == "KILLED"
    assert process.wait(240) == 0
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]
    run = synced(tmp_path / "packed.run")["run_id"]
    assert store_client(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run).info.status == "KILLED"


@pytest.mark.slow
def test_one_process_replays_all_stages_until_a_store_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage in whose place it ended takes a new one; each has the environment of its stage."""
    used = []
    for root in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        root.mkdir(exist_ok=True)
        with track(root) as tracker, track(tmp_path, seed=len(used)) as other:
            used.append((tracker.replayer.process.pid, other.replayer.process.pid))
            losses(root, range(3))
        assert [step for step, _ in history(root)] == [0, 1, 2]
    assert len({frozenset(pair) for pair in used}) == 1 and len(set(used[0])) == 2
    for path in tmp_path.rglob("mlflow.db"):
        path.unlink()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unused")
    with track(tmp_path) as tracker:
        assert tracker.replayer.process.pid not in used[0]
        losses(tmp_path, range(2))
        tracker.replayer.process.kill()
        tracker.replayer.process.wait()
    assert tracker.replayer not in mlflow_replayer._idle


@pytest.mark.slow
def test_a_script_of_the_user_is_not_taken_for_a_module_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("random", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a script')")
    with track(tmp_path):
        losses(tmp_path, range(3))
    assert [step for step, _ in history(tmp_path)] == [0, 1, 2]


def test_the_end_of_an_earlier_start_is_not_recorded(tmp_path: Path) -> None:
    """The process beside a stage that was killed may outlive it, and the stage be started again meanwhile."""
    folder, first, second = tmp_path / "packed.run", track(tmp_path), track(tmp_path)
    write_state(folder, second.state)
    record_end(folder, first.attempt, {"status": "KILLED", "outcome": {"error": "killed"}})
    assert read_state(folder) == second.state
    record_end(folder, second.attempt, {"status": "FAILED", "outcome": {"error": "OSError"}})
    assert read_state(folder)["status"] == "FAILED"


def test_a_full_disk_costs_mlflow_one_line(tmp_path: Path) -> None:
    """Neither the log nor how the stage ended finds room; the process beside the stages goes on."""
    with track(tmp_path):
        losses(tmp_path, range(2))
    folder = tmp_path / "packed.run"
    (folder / "log.txt").unlink(missing_ok=True)
    (folder / "log.txt").symlink_to("/dev/full")
    (folder / "tracking.json").unlink()
    (folder / "tracking.json").symlink_to("/dev/full")
    begun = {"folder": str(folder), "attempt": "a", "environment": dict(os.environ)}
    lines = "".join(f"{json.dumps(line)}\n" for line in (begun, {}) * 2)
    command = [sys.executable, "-P", "-W", "ignore", "-m", "mvhpc.runs.mlflow_process"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines() == ["{}", "{}"]
    assert len(done.stderr.splitlines()) == 2 and done.stderr.count("the store cannot be used now") == 2
